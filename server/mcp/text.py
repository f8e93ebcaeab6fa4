"""Tools for text: ask a language model, embed texts, order documents."""

from __future__ import annotations

from mcp_types import CallToolResult

from server.mcp.tool import Call, Schema, Tool, as_text, result

_TEXTS: Schema = {"type": "array", "items": {"type": "string"}, "minItems": 1}

_ANSWER: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "text": {"type": "string"},
        "finish_reason": {"type": ["string", "null"]},
        "usage": {"type": ["object", "null"]},
    },
    "required": ["model", "text"],
}
_VECTORS: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "embeddings": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    },
    "required": ["model", "embeddings"],
}
_RANKS: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "results": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "index": {"type": "integer"},
                    "relevance_score": {"type": "number"},
                },
                "required": ["index", "relevance_score"],
            },
        },
    },
    "required": ["model", "results"],
}


async def _chat(call: Call) -> CallToolResult:
    document = call.given("prompt", "system")
    messages = [{"role": "user", "content": call.arguments.get("prompt")}]
    if call.arguments.get("system") is not None:
        messages.insert(0, {"role": "system", "content": call.arguments["system"]})
    answer = (
        await call.post("/v1/chat/completions", {**document, "messages": messages})
    ).document()
    choice = answer["choices"][0]
    text = choice["message"].get("content") or ""
    structured = {
        "model": answer.get("model") or document["model"],
        "text": text,
        "finish_reason": choice.get("finish_reason"),
        "usage": answer.get("usage"),
    }
    return result(text, structured)


async def _embed(call: Call) -> CallToolResult:
    document = call.given()
    answer = (await call.post("/v1/embeddings", document)).document()
    vectors = [each["embedding"] for each in answer["data"]]
    structured = {"model": document["model"], "embeddings": vectors}
    # Numbers that no reader understands are not repeated as text.
    return result(f"{len(vectors)} embeddings of {len(vectors[0])} numbers.", structured)


async def _rerank(call: Call) -> CallToolResult:
    document = call.given()
    answer = (await call.post("/v1/rerank", document)).document()
    ranks = [
        {"index": each["index"], "relevance_score": each["relevance_score"]}
        for each in answer["results"]
    ]
    structured = {"model": document["model"], "results": ranks}
    return result(as_text(structured), structured)


TEXT_TOOLS = (
    Tool(
        name="chat",
        title="Ask a language model",
        description="The answer of a language model of this server to one prompt.",
        path="/v1/chat/completions",
        task="generate",
        takes_model=True,
        properties={
            "prompt": {"type": "string", "description": "What the model is asked."},
            "system": {"type": "string", "description": "How the model should answer."},
            "max_tokens": {
                "type": "integer",
                "minimum": 1,
                "description": "The longest answer, in tokens.",
            },
            "temperature": {
                "type": "number",
                "minimum": 0,
                "maximum": 2,
                "description": "0 always takes the likeliest word.",
            },
        },
        required=("prompt",),
        output=_ANSWER,
        read_only=True,
        run=_chat,
    ),
    Tool(
        name="embed",
        title="Embed texts",
        description="The embeddings of texts, as structured content: one list of numbers a text.",
        path="/v1/embeddings",
        task="embed",
        takes_model=True,
        properties={
            "input": {**_TEXTS, "description": "The texts."},
            "dimensions": {
                "type": "integer",
                "minimum": 1,
                "description": "Fewer numbers a text, for models that can.",
            },
        },
        required=("input",),
        output=_VECTORS,
        read_only=True,
        run=_embed,
    ),
    Tool(
        name="rerank",
        title="Order documents",
        description="Order documents by how well they answer a query, the best first.",
        path="/v1/rerank",
        task="rerank",
        takes_model=True,
        properties={
            "query": {"type": "string", "description": "The question."},
            "documents": {**_TEXTS, "description": "The documents."},
            "top_n": {
                "type": "integer",
                "minimum": 1,
                "description": "How many of the best are returned.",
            },
        },
        required=("query", "documents"),
        output=_RANKS,
        read_only=True,
        run=_rerank,
    ),
)
