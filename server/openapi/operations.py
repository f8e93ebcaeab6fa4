"""The operations of the OpenAPI document, by path and method."""

from __future__ import annotations

from collections.abc import Mapping

from engine.media.audio_output import ENCODINGS
from server.headers import CACHE_HEADER
from server.openapi.components import BOOLEAN, MCP_MESSAGE, STRING
from server.openapi.operation import (
    BINARY,
    EVENTS,
    JSON,
    LINES,
    TEXT,
    Operation,
    Schema,
    record,
    reference,
)
from server.schemas.audio import (
    SpeechBody,
    TranscriptionBody,
    TranslationBody,
    VoiceBody,
    VoicesQuery,
)
from server.schemas.batches import BatchBody, BatchListQuery
from server.schemas.client_secrets import ClientSecretBody
from server.schemas.engine import EventsQuery, PlanBody, RouteBody
from server.schemas.images import EditBody, GenerationBody, ImageBody, VariationBody
from server.schemas.ollama import (
    OllamaBody,
    OllamaChatBody,
    OllamaDeleteBody,
    OllamaEmbedBody,
    OllamaEmbeddingsBody,
    OllamaGenerateBody,
    OllamaPullBody,
    OllamaShowBody,
)
from server.schemas.responses import (
    CompactBody,
    ConversationBody,
    IncludeQuery,
    ItemsBody,
    ItemsQuery,
    MetadataBody,
    ResponseQuery,
)
from server.schemas.stored_files import (
    CompleteBody,
    FileBody,
    FileListQuery,
    PartBody,
    UploadBody,
)
from server.schemas.usage import UsageQuery
from server.schemas.vector_stores import (
    AttributesBody,
    FileBatchBody,
    SearchBody,
    StoreFileBody,
    StoreFileListQuery,
    VectorStoreBody,
    VectorStoreChangeBody,
    VectorStoreListQuery,
)
from server.schemas.videos import VideoBody, VideoContentQuery, VideoListQuery

OPENAI = "https://platform.openai.com/docs/api-reference"
ANTHROPIC = "https://docs.anthropic.com/en/api"
VLLM = "https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html"
TOKENIZER = f"{VLLM}#tokenizer-api"

OLLAMA = "https://docs.ollama.com/api"
MCP = "https://modelcontextprotocol.io/specification/2025-11-25"

MODEL = "MODEL"
"""Stands in an example for the id of a configured model."""

_CACHE = {CACHE_HEADER: "`off`: nothing of the response cache; `refresh`: a new answer for it."}

_MESSAGES = [{"role": "user", "content": "Hello"}]

Methods = Mapping[str, Operation]


def _text(
    summary: str, link: str, *, streams: bool = False, task: str = "generate", **example: object
) -> Methods:
    """An operation whose body is that of another provider or library."""
    body = record(
        model={**STRING, "minLength": 1},
        optional={"stream": BOOLEAN} if streams else None,
    )
    answers: dict[str, Schema] = {JSON: {"type": "object"}}
    if streams:
        answers[EVENTS] = STRING
    operation = Operation(
        summary=summary,
        description="The linked page describes the other fields and the answer.",
        answers=answers,
        json={**body, "additionalProperties": True},
        scheduled=True,
        headers=_CACHE,
        link=link,
        example={"model": MODEL, **example},
        task=task,
    )
    return {"post": operation}


def _images(summary: str, kind: type[ImageBody], example: Mapping[str, object] | None) -> Methods:
    operation = Operation(
        summary=summary,
        description="With `stream` the answer is events: previews, then each image.",
        answers={JSON: reference("Images"), EVENTS: STRING}
        if kind is not VariationBody
        else {JSON: reference("Images")},
        json=kind,
        form=kind,
        scheduled=True,
        headers=_CACHE,
        link=f"{OPENAI}/images",
        example=example,
        task="image",
    )
    return {"post": operation}


def _recording(summary: str, kind: type[TranscriptionBody | TranslationBody]) -> Methods:
    answers: dict[str, Schema] = {JSON: reference("Transcript"), TEXT: STRING, "text/vtt": STRING}
    if kind is TranscriptionBody:
        answers[EVENTS] = STRING
    operation = Operation(
        summary=summary,
        description="`response_format` chooses the form of the answer.",
        answers=answers,
        form=kind,
        scheduled=True,
        headers=_CACHE,
        link=f"{OPENAI}/audio",
        task="transcribe",
    )
    return {"post": operation}


def _action(summary: str) -> Methods:
    return {"post": Operation(summary=summary, answers={JSON: reference("Model")})}


def _ollama(
    summary: str,
    kind: type[OllamaBody],
    answer: Schema,
    *,
    page: str,
    streams: bool = False,
    task: str | None = None,
    example: Mapping[str, object] | None = None,
) -> Operation:
    """An operation of Ollama's API."""
    answers = {JSON: answer, **({LINES: STRING} if streams else {})}
    return Operation(
        summary=summary,
        description="One JSON object a line, unless `stream` is false." if streams else "",
        answers=answers,
        json=kind,
        scheduled=True,
        link=f"{OLLAMA}/{page}",
        example=None if example is None else {"model": MODEL, **example},
        task=task,
    )


def _refused(summary: str) -> Methods:
    """An operation of Ollama's API that is not served."""
    return {"post": Operation(summary=f"{summary}: refused", answers={JSON: {"type": "object"}})}


def _deleted(kind: str) -> Schema:
    return record(id=STRING, object={"const": kind}, deleted={"const": True})


def _both(operation: Operation) -> Methods:
    """The operation for GET and HEAD."""
    return {"get": operation, "head": operation}


def _page(summary: str, *media_types: str) -> Methods:
    return _both(Operation(summary=summary, answers=dict.fromkeys(media_types, STRING)))


_RERANK = _text(
    "Documents by their relevance to a query",
    "https://docs.cohere.com/v2/reference/rerank",
    task="rerank",
    query="Where is the train?",
    documents=["It stands on the turntable.", "Bread is baked."],
)
_SCORE = _text(
    "Scores of pairs of texts",
    f"{VLLM}#score-api",
    task="rerank",
    text_1="Where is the train?",
    text_2=["It stands on the turntable.", "Bread is baked."],
)
_CLASSIFY = _text("Labels of texts", f"{VLLM}#classification-api", task="classify", input="Hello")

_FILLED: Schema = {
    "type": "array",
    "items": record(
        score={"type": "number", "minimum": 0, "maximum": 1},
        token={"type": "integer", "minimum": 0},
        token_str=STRING,
        sequence=STRING,
    ),
}
_TEXTS: Schema = {"anyOf": [STRING, {"type": "array", "items": STRING, "minItems": 1}]}
_FILLING: Mapping[str, Schema] = {
    "top_k": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5},
    "targets": _TEXTS,
}
_FILL_MASK: Methods = {
    "post": Operation(
        summary="The likeliest tokens for each mask of a text",
        description="The answer is a list for one mask, a list of lists for several masks, and for"
        " a list of texts a list of these. `parameters` may hold `top_k` and `targets`.",
        answers={
            JSON: {
                "anyOf": [
                    _FILLED,
                    {"type": "array", "items": _FILLED},
                    {
                        "type": "array",
                        "items": {"anyOf": [_FILLED, {"type": "array", "items": _FILLED}]},
                    },
                ]
            }
        },
        json=record(
            model={**STRING, "minLength": 1},
            inputs=_TEXTS,
            optional={**_FILLING, "parameters": {"type": "object", "properties": _FILLING}},
        ),
        scheduled=True,
        headers=_CACHE,
        link="https://huggingface.co/docs/inference-providers/tasks/fill-mask",
        example={"model": MODEL, "inputs": "Hello, I am a <mask>."},
        task="embed",
    )
}
_VECTOR_STORES = f"{OPENAI}/vector-stores"


OPERATIONS: Mapping[str, Methods] = {
    "/v1/chat/completions": _text(
        "Chat completion", f"{OPENAI}/chat/create", streams=True, messages=_MESSAGES
    ),
    "/v1/completions": _text(
        "Completion", f"{OPENAI}/completions/create", streams=True, prompt="Once"
    ),
    "/v1/responses": _text("Response", f"{OPENAI}/responses/create", streams=True, input="Hello"),
    "/v1/responses/input_tokens": _text(
        "Number of tokens of a response's input", f"{OPENAI}/responses/input-tokens", input="Hello"
    ),
    "/v1/responses/compact": {
        "post": Operation(
            summary="A summary in place of earlier turns",
            answers={JSON: reference("Compaction")},
            json=CompactBody,
            scheduled=True,
            link=f"{OPENAI}/responses/compact",
            example={"model": MODEL, "input": "Hello"},
            task="generate",
        )
    },
    "/v1/responses/{response_id}": {
        "get": Operation(
            summary="One response",
            description="With `stream` the answer is events of a response in the background.",
            answers={JSON: reference("Response"), EVENTS: STRING},
            query=ResponseQuery,
            link=f"{OPENAI}/responses/get",
        ),
        "delete": Operation(
            summary="Delete a response",
            description="One in the background is stopped first.",
            answers={JSON: _deleted("response.deleted")},
        ),
    },
    "/v1/responses/{response_id}/cancel": {
        "post": Operation(
            summary="Stop a response in the background, and keep its record",
            answers={JSON: reference("Response")},
        )
    },
    "/v1/responses/{response_id}/input_items": {
        "get": Operation(
            summary="The items that a response was made from, with those of earlier turns",
            answers={JSON: reference("ItemList")},
            query=ItemsQuery,
        )
    },
    "/v1/conversations": {
        "post": Operation(
            summary="Create a conversation",
            answers={JSON: reference("Conversation")},
            json=ConversationBody,
            link=f"{OPENAI}/conversations",
            example={"items": [{"role": "user", "content": "Hello"}]},
        )
    },
    "/v1/conversations/{conversation_id}": {
        "get": Operation(summary="One conversation", answers={JSON: reference("Conversation")}),
        "post": Operation(
            summary="Replace the metadata of a conversation",
            answers={JSON: reference("Conversation")},
            json=MetadataBody,
        ),
        "delete": Operation(
            summary="Delete a conversation",
            description="Its responses stay.",
            answers={JSON: _deleted("conversation.deleted")},
        ),
    },
    "/v1/conversations/{conversation_id}/items": {
        "get": Operation(
            summary="The items of a conversation",
            answers={JSON: reference("ItemList")},
            query=ItemsQuery,
        ),
        "post": Operation(
            summary="Add items to a conversation",
            answers={JSON: reference("ItemList")},
            json=ItemsBody,
            query=IncludeQuery,
        ),
    },
    "/v1/conversations/{conversation_id}/items/{item_id}": {
        "get": Operation(
            summary="One item of a conversation",
            answers={JSON: {"type": "object"}},
            query=IncludeQuery,
        ),
        "delete": Operation(
            summary="Delete an item of a conversation",
            answers={JSON: reference("Conversation")},
        ),
    },
    "/v1/messages": _text(
        "Anthropic's message",
        f"{ANTHROPIC}/messages",
        streams=True,
        messages=_MESSAGES,
        max_tokens=64,
    ),
    "/v1/messages/count_tokens": _text(
        "Number of tokens of a message",
        f"{ANTHROPIC}/messages-count-tokens",
        messages=_MESSAGES,
    ),
    "/v1/embeddings": _text(
        "Embeddings", f"{OPENAI}/embeddings/create", task="embed", input="Hello"
    ),
    "/rerank": _RERANK,
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/score": _SCORE,
    "/v1/score": _SCORE,
    "/classify": _CLASSIFY,
    "/v1/classify": _CLASSIFY,
    "/v1/moderations": _text(
        "Whether texts are harmful", f"{OPENAI}/moderations", task="classify", input="Hello"
    ),
    "/v1/fill-mask": _FILL_MASK,
    "/tokenize": _text("Tokens of a text", TOKENIZER, prompt="Hello"),
    "/v1/tokenize": _text("Tokens of a text", TOKENIZER, prompt="Hello"),
    "/detokenize": _text("Text of tokens", TOKENIZER, tokens=[1, 2, 3]),
    "/v1/detokenize": _text("Text of tokens", TOKENIZER, tokens=[1, 2, 3]),
    "/v1/images/generations": _images(
        "Images from a prompt", GenerationBody, {"model": MODEL, "prompt": "a red train"}
    ),
    "/v1/images/edits": _images("Images from images and a prompt", EditBody, None),
    "/v1/images/variations": _images("Variations of an image", VariationBody, None),
    "/v1/images/files/{name}": _both(
        Operation(
            summary="An image that a request asked for as a URL",
            description="Needs no key: its name cannot be guessed.",
            answers=dict.fromkeys(("image/png", "image/jpeg", "image/webp"), BINARY),
        )
    ),
    "/v1/videos": {
        "post": Operation(
            summary="Make a video",
            description="Makes a job, which outlives the connection.",
            answers={JSON: reference("Video")},
            json=VideoBody,
            form=VideoBody,
            scheduled=True,
            link=f"{OPENAI}/videos",
            example={"model": MODEL, "prompt": "a red train"},
            task="video",
        ),
        "get": Operation(
            summary="The videos",
            answers={JSON: reference("VideoList")},
            query=VideoListQuery,
            link=f"{OPENAI}/videos",
        ),
    },
    "/v1/videos/{video_id}": {
        "get": Operation(summary="One video", answers={JSON: reference("Video")}),
        "delete": Operation(
            summary="Delete a video",
            description="Stops the job if it has not ended.",
            answers={
                JSON: record(id=STRING, object={"const": "video.deleted"}, deleted={"const": True})
            },
        ),
    },
    "/v1/videos/{video_id}/content": _both(
        Operation(
            summary="The file of a video, or its thumbnail",
            answers={"video/mp4": BINARY, "image/webp": BINARY},
            query=VideoContentQuery,
        )
    ),
    "/v1/videos/{video_id}/cancel": {
        "post": Operation(
            summary="Stop the job of a video and keep its record",
            answers={JSON: reference("Video")},
        )
    },
    "/v1/files": {
        "post": Operation(
            summary="Keep a file",
            answers={JSON: reference("File")},
            form=FileBody,
            link=f"{OPENAI}/files",
        ),
        "get": Operation(
            summary="The files",
            answers={JSON: reference("FileList")},
            query=FileListQuery,
            link=f"{OPENAI}/files",
        ),
    },
    "/v1/files/{file_id}": {
        "get": Operation(summary="One file", answers={JSON: reference("File")}),
        "delete": Operation(
            summary="Delete a file",
            description="Answers 409 while something uses it.",
            answers={JSON: record(id=STRING, object={"const": "file"}, deleted={"const": True})},
        ),
    },
    "/v1/files/{file_id}/content": _both(
        Operation(
            summary="The bytes of a file",
            answers={"application/octet-stream": BINARY, "application/jsonl": STRING},
        )
    ),
    "/v1/uploads": {
        "post": Operation(
            summary="Begin a file that comes in parts",
            answers={JSON: reference("Upload")},
            json=UploadBody,
            link=f"{OPENAI}/uploads",
        )
    },
    "/v1/uploads/{upload_id}/parts": {
        "post": Operation(
            summary="Add a part",
            answers={
                JSON: record(
                    id=STRING,
                    object={"const": "upload.part"},
                    created_at={"type": "integer"},
                    upload_id=STRING,
                )
            },
            form=PartBody,
        )
    },
    "/v1/uploads/{upload_id}/complete": {
        "post": Operation(
            summary="Make the file from its parts",
            answers={JSON: reference("Upload")},
            json=CompleteBody,
        )
    },
    "/v1/uploads/{upload_id}/cancel": {
        "post": Operation(
            summary="End an upload without a file", answers={JSON: reference("Upload")}
        )
    },
    "/v1/batches": {
        "post": Operation(
            summary="Run the requests of a file",
            description="They run while no other request needs the device.",
            answers={JSON: reference("Batch")},
            json=BatchBody,
            link=f"{OPENAI}/batch",
        ),
        "get": Operation(
            summary="The batches",
            answers={JSON: reference("BatchList")},
            query=BatchListQuery,
            link=f"{OPENAI}/batch",
        ),
    },
    "/v1/batches/{batch_id}": {
        "get": Operation(summary="One batch", answers={JSON: reference("Batch")}),
    },
    "/v1/batches/{batch_id}/cancel": {
        "post": Operation(
            summary="Begin no further line of a batch, and keep the results so far",
            answers={JSON: reference("Batch")},
        )
    },
    "/v1/vector_stores": {
        "post": Operation(
            summary="Make a vector store",
            answers={JSON: reference("VectorStore")},
            json=VectorStoreBody,
            link=_VECTOR_STORES,
            example={"name": "Notes"},
        ),
        "get": Operation(
            summary="The vector stores",
            answers={JSON: reference("VectorStoreList")},
            query=VectorStoreListQuery,
            link=_VECTOR_STORES,
        ),
    },
    "/v1/vector_stores/{vector_store_id}": {
        "get": Operation(summary="One vector store", answers={JSON: reference("VectorStore")}),
        "post": Operation(
            summary="Change a vector store",
            answers={JSON: reference("VectorStore")},
            json=VectorStoreChangeBody,
            link=_VECTOR_STORES,
        ),
        "delete": Operation(
            summary="Delete a vector store",
            description="Its files stay in `/v1/files`.",
            answers={JSON: _deleted("vector_store.deleted")},
        ),
    },
    "/v1/vector_stores/{vector_store_id}/search": {
        "post": Operation(
            summary="The passages that are closest to a query",
            answers={JSON: reference("SearchResults")},
            json=SearchBody,
            link=f"{_VECTOR_STORES}/search",
            example={"query": "Where is the train?"},
        )
    },
    "/v1/vector_stores/{vector_store_id}/files": {
        "post": Operation(
            summary="Attach a file to a vector store",
            description="It is read and embedded in the background.",
            answers={JSON: reference("VectorStoreFile")},
            json=StoreFileBody,
            link=f"{_VECTOR_STORES}-files",
        ),
        "get": Operation(
            summary="The files of a vector store",
            answers={JSON: reference("VectorStoreFileList")},
            query=StoreFileListQuery,
            link=f"{_VECTOR_STORES}-files",
        ),
    },
    "/v1/vector_stores/{vector_store_id}/files/{file_id}": {
        "get": Operation(
            summary="One file of a vector store", answers={JSON: reference("VectorStoreFile")}
        ),
        "post": Operation(
            summary="Replace the attributes of a file",
            answers={JSON: reference("VectorStoreFile")},
            json=AttributesBody,
        ),
        "delete": Operation(
            summary="Take a file out of a vector store",
            description="The file stays in `/v1/files`.",
            answers={JSON: _deleted("vector_store.file.deleted")},
        ),
    },
    "/v1/vector_stores/{vector_store_id}/files/{file_id}/content": {
        "get": Operation(
            summary="The passages of a file",
            answers={
                JSON: record(
                    object={"const": "vector_store.file_content.page"},
                    data={"type": "array", "items": record(type={"const": "text"}, text=STRING)},
                    has_more=BOOLEAN,
                    next_page={"type": "null"},
                )
            },
        )
    },
    "/v1/vector_stores/{vector_store_id}/file_batches": {
        "post": Operation(
            summary="Attach several files",
            answers={JSON: reference("VectorStoreFileBatch")},
            json=FileBatchBody,
            link=f"{_VECTOR_STORES}-file-batches",
        )
    },
    "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}": {
        "get": Operation(
            summary="One batch of files", answers={JSON: reference("VectorStoreFileBatch")}
        )
    },
    "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/cancel": {
        "post": Operation(
            summary="Cancel the files of a batch that are in progress",
            answers={JSON: reference("VectorStoreFileBatch")},
        )
    },
    "/v1/vector_stores/{vector_store_id}/file_batches/{batch_id}/files": {
        "get": Operation(
            summary="The files of a batch",
            answers={JSON: reference("VectorStoreFileList")},
            query=StoreFileListQuery,
        )
    },
    "/v1/audio/speech": {
        "post": Operation(
            summary="Speech from a text",
            description=(
                "With `stream_format: sse` the answer is events: `speech.audio.words`,"
                " `speech.audio.delta` with base64, and `speech.audio.done`."
            ),
            answers={
                **{each.media_type: BINARY for each in ENCODINGS.values()},
                EVENTS: STRING,
            },
            json=SpeechBody,
            scheduled=True,
            headers=_CACHE,
            link=f"{OPENAI}/audio/createSpeech",
            example={"model": MODEL, "input": "All aboard!"},
            task="speech",
        )
    },
    "/v1/realtime/client_secrets": {
        "post": Operation(
            summary="A secret with which a browser opens a realtime session",
            answers={
                JSON: record(
                    value=STRING, expires_at={"type": "integer"}, session={"type": "object"}
                )
            },
            json=ClientSecretBody,
            link=f"{OPENAI}/realtime-sessions/create-realtime-client-secret",
        )
    },
    "/v1/audio/transcriptions": _recording("Text of a recording", TranscriptionBody),
    "/v1/audio/translations": _recording("English text of a recording", TranslationBody),
    "/v1/audio/models": {
        "get": Operation(
            summary="The names of the speech models, as Open WebUI reads them",
            answers={JSON: record(models={"type": "array", "items": record(id=STRING)})},
        ),
    },
    "/v1/audio/voices": {
        "get": Operation(
            summary="The voices of the speech models, and the cloned voices",
            answers={JSON: reference("VoiceList")},
            query=VoicesQuery,
        ),
        "post": Operation(
            summary="Add a cloned voice",
            answers={JSON: reference("ClonedVoice")},
            form=VoiceBody,
        ),
    },
    "/v1/audio/voices/{voice_id}": {
        "delete": Operation(
            summary="Remove a cloned voice",
            answers={
                JSON: record(id=STRING, object={"const": "audio.voice"}, deleted={"const": True})
            },
        )
    },
    "/v1/models": {
        "get": Operation(
            summary="The models",
            description="An alias is listed as a model of its own, with `alias_of`; so is a LoRA of"
            " a language model, with `parent`.",
            answers={JSON: reference("ModelList")},
            link=f"{OPENAI}/models",
        )
    },
    "/v1/models/{name}": {
        "get": Operation(
            summary="One model",
            answers={JSON: {"anyOf": [reference("Model"), reference("RouteModel")]}},
        )
    },
    "/v1/engine": {
        "get": Operation(
            summary="Every byte, every model, the queue", answers={JSON: reference("EngineStatus")}
        )
    },
    "/v1/engine/plan": {
        "post": Operation(
            summary="What the engine would do for a request",
            description="Changes nothing.",
            answers={JSON: reference("Plan")},
            json=PlanBody,
            example={"model": MODEL},
        )
    },
    "/v1/engine/route": {
        "post": Operation(
            summary="Which model a route would choose for a request, and why",
            description="Runs nothing.",
            answers={JSON: reference("Route")},
            json=RouteBody,
            example={"body": {"model": MODEL, "messages": _MESSAGES}},
        )
    },
    "/v1/engine/events": {
        "get": Operation(
            summary="What was loaded, parked and evicted, and why",
            description=(
                "With `stream`, or if the client accepts `text/event-stream`, the answer is events"
                " with ids. An event `lost` reports that some are missing."
            ),
            answers={JSON: reference("EventPage"), EVENTS: STRING},
            query=EventsQuery,
            headers={"last-event-id": "The id of the last event that the client has read."},
        )
    },
    "/v1/engine/cache": {
        "get": Operation(
            summary="What the response cache holds", answers={JSON: reference("ResponseCache")}
        ),
        "delete": Operation(
            summary="Empty the response cache", answers={JSON: reference("ClearedCache")}
        ),
    },
    "/v1/engine/usage": {
        "get": Operation(
            summary="What was used, what it cost and saved, and how the budgets stand",
            description="An admin sees all, a key its own. Money is in dollars, days are UTC's.",
            answers={JSON: reference("Usage")},
            query=UsageQuery,
        )
    },
    "/v1/engine/models/{name}/load": _action("Load or wake a model"),
    "/v1/engine/models/{name}/unload": _action("Unload a model"),
    "/v1/engine/models/{name}/park": _action("Park a model: keep only its host copy"),
    "/v1/engine/models/{name}/pin": _action("Never evict a model"),
    "/v1/engine/models/{name}/unpin": _action("Allow the eviction of a model again"),
    "/v1/engine/models/{name}/pull": {
        "post": Operation(
            summary="Fetch the files of a model from its hub",
            description="Events `pull.progress`, then `pull.completed` or `error`.",
            answers={EVENTS: STRING},
        )
    },
    "/v1/engine/models/{name}/files": {
        "delete": Operation(
            summary="Delete the files of a model",
            description="The model must not be loaded.",
            answers={JSON: reference("DeletedFiles")},
        )
    },
    "/v1/engine/files": {
        "get": Operation(
            summary="The files of the models, and their sizes",
            answers={JSON: reference("FilesList")},
        )
    },
    "/v1/engine/models/{name}/loras/{lora}": {
        "delete": Operation(
            summary="Delete a LoRA from the folder of a model",
            description="No request may use it.",
            answers={JSON: reference("DeletedLora")},
        )
    },
    "/v1/engine/loras": {
        "get": Operation(
            summary="The LoRAs of the models",
            answers={JSON: reference("LoraList")},
        ),
        "post": Operation(
            summary="Add a LoRA to the folder of a model",
            answers={JSON: reference("AddedLora")},
            form={
                **record(
                    model=STRING,
                    file=BINARY,
                    optional={
                        "name": {**STRING, "description": "By default the file's name."},
                        "config": {
                            **BINARY,
                            "description": "adapter_config.json, for a language model.",
                        },
                    },
                ),
                "additionalProperties": False,
            },
        ),
    },
    "/api/chat": {
        "post": _ollama(
            "Ollama's chat",
            OllamaChatBody,
            reference("OllamaChat"),
            page="chat",
            streams=True,
            task="generate",
            example={"messages": _MESSAGES},
        )
    },
    "/api/generate": {
        "post": _ollama(
            "Ollama's completion",
            OllamaGenerateBody,
            reference("OllamaGenerated"),
            page="generate",
            streams=True,
            task="generate",
            example={"prompt": "Hello"},
        )
    },
    "/api/embed": {
        "post": _ollama(
            "Ollama's embeddings",
            OllamaEmbedBody,
            reference("OllamaEmbeddings"),
            page="embed",
            task="embed",
            example={"input": "Hello"},
        )
    },
    "/api/embeddings": {
        "post": _ollama(
            "Ollama's former embeddings",
            OllamaEmbeddingsBody,
            reference("OllamaEmbedding"),
            page="embed",
            task="embed",
            example={"prompt": "Hello"},
        )
    },
    "/api/tags": _both(
        Operation(
            summary="The models for text, as Ollama lists them",
            answers={JSON: reference("OllamaTags")},
            link=f"{OLLAMA}/tags",
        )
    ),
    "/api/ps": {
        "get": Operation(
            summary="The models on the device, as Ollama lists them",
            answers={JSON: reference("OllamaRunning")},
            link=f"{OLLAMA}/ps",
        )
    },
    "/api/show": {
        "post": _ollama(
            "What a model is and can do, as Ollama tells",
            OllamaShowBody,
            reference("OllamaShown"),
            page="show",
            example={},
        )
    },
    "/api/version": _both(
        Operation(
            summary="The version of Ollama whose API this is",
            answers={JSON: record(version=STRING, roundhouse=STRING)},
        )
    ),
    "/api/pull": {
        "post": _ollama(
            "Fetch the files of a configured model",
            OllamaPullBody,
            record(status=STRING),
            page="pull",
            streams=True,
        )
    },
    "/api/delete": {
        "delete": Operation(
            summary="Delete the files of a model",
            description="An idle model is unloaded first. The answer is empty.",
            answers={},
            json=OllamaDeleteBody,
            link=f"{OLLAMA}/delete",
        )
    },
    "/api/copy": _refused("Copy a model"),
    "/api/create": _refused("Make a model"),
    "/api/push": _refused("Upload a model"),
    "/mcp": {
        "post": Operation(
            summary="Tools for agents, by the Model Context Protocol",
            description=(
                "A message of JSON-RPC. The linked page describes it; `tools/list` describes the"
                " tools that the key may use."
            ),
            answers={JSON: reference("McpMessage"), EVENTS: STRING},
            others={202: "A notification was taken."},
            json=MCP_MESSAGE,
            link=f"{MCP}/basic/transports",
            example={"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
        )
    },
    "/health": _both(
        Operation(
            summary="Whether the process is alive",
            answers={JSON: reference("Status")},
            others={503: "It is not."},
        )
    ),
    "/health/providers": {
        "get": Operation(
            summary="How the providers of remote models are",
            answers={JSON: reference("ProviderList")},
        )
    },
    "/ready": _both(
        Operation(
            summary="Whether the server takes work now",
            answers={JSON: reference("Status")},
            others={503: "It starts or drains."},
        )
    ),
    "/ping": _both(
        Operation(
            summary="The same for RunPod",
            answers={JSON: reference("Status")},
            others={204: "It starts.", 503: "It drains or failed."},
        )
    ),
    "/metrics": {
        "get": Operation(
            summary="Metrics for Prometheus",
            answers={TEXT: STRING, "application/openmetrics-text": STRING},
        )
    },
    "/": _page("The dashboard; plain text for programs that look for Ollama", "text/html", TEXT),
    "/web/{name}": _page("A file of the dashboard", "text/javascript", "text/css", "image/svg+xml"),
    "/openapi.json": {
        "get": Operation(summary="This document", answers={JSON: {"type": "object"}})
    },
    "/docs": _page("This document as a page", "text/html"),
    "/docs/{name}": _page("A file of that page", "text/javascript", "text/css", "text/plain"),
}
"""All of them."""
