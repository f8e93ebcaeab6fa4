"""Tools that search vector stores."""

from __future__ import annotations

from urllib.parse import quote

from mcp_types import CallToolResult

from server.mcp.tool import Call, Schema, Tool, ToolFailure, as_text, fields_of, result
from server.schemas.vector_stores import SearchBody

_STORES: Schema = {
    "type": "object",
    "properties": {
        "vector_stores": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "name": {"type": ["string", "null"]},
                    "files": {"type": "integer", "description": "Those that can be searched."},
                },
                "required": ["id", "files"],
            },
        },
        "has_more": {"type": "boolean"},
    },
    "required": ["vector_stores"],
}
_FOUND: Schema = {
    "type": "object",
    "properties": {
        "results": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "file_id": {"type": "string"},
                    "filename": {"type": "string"},
                    "score": {"type": "number"},
                    "text": {"type": "string"},
                },
                "required": ["file_id", "score", "text"],
            },
        }
    },
    "required": ["results"],
}


async def _list(call: Call) -> CallToolResult:
    after = call.arguments.get("after")
    query = "limit=100" if after is None else f"limit=100&after={quote(str(after), safe='')}"
    page = (await call.get("/v1/vector_stores", query)).document()
    stores = [
        {"id": each["id"], "name": each["name"], "files": each["file_counts"]["completed"]}
        for each in page["data"]
    ]
    structured = {"vector_stores": stores, "has_more": page["has_more"]}
    return result(as_text(structured), structured)


async def _search(call: Call) -> CallToolResult:
    store_id = call.arguments["vector_store_id"]
    if not isinstance(store_id, str) or not store_id:
        raise ToolFailure("vector_store_id: it is an id of list_vector_stores.")
    path = f"/v1/vector_stores/{quote(store_id, safe='')}/search"
    page = (await call.post(path, call.given("vector_store_id"))).document()
    found = [
        {
            "file_id": each["file_id"],
            "filename": each["filename"],
            "score": each["score"],
            "attributes": each["attributes"],
            "text": "\n".join(part["text"] for part in each["content"]),
        }
        for each in page["data"]
    ]
    structured = {"results": found}
    return result(as_text(structured), structured)


SEARCH_TOOLS = (
    Tool(
        name="list_vector_stores",
        title="List the vector stores",
        description="The stores of files that the tool search can search, by id and name.",
        path="/v1/vector_stores",
        beside="embed",
        properties={
            "after": {
                "type": "string",
                "description": "The last id of the page before, if there were more.",
            }
        },
        output=_STORES,
        read_only=True,
        run=_list,
    ),
    Tool(
        name="search",
        title="Search files",
        description="The passages of the files in a vector store that fit a question best.",
        path="/v1/vector_stores",
        beside="embed",
        properties={
            "vector_store_id": {
                "type": "string",
                "minLength": 1,
                "description": "An id of list_vector_stores.",
            },
            "query": {"type": "string", "description": "The question, in plain words."},
            **fields_of(
                SearchBody,
                max_num_results="How many passages.",
                filters="Conditions on the attributes of files, as in OpenAI's search.",
            ),
        },
        required=("vector_store_id", "query"),
        output=_FOUND,
        read_only=True,
        run=_search,
    ),
)
