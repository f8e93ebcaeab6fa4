"""The named schemas of the OpenAPI document: what the routes answer."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from engine.costs.budget import BudgetStatus
from engine.costs.usage_store import COUNTS, GROUPS
from engine.route_config import Preference
from engine.scheduling.scheduler_event import EventKind
from engine.status import EngineState, EngineStatus, Forecast, ModelStatus, ProviderStatus
from server.batches.record import BatchState
from server.json_schema import SchemaGenerator
from server.openapi.operation import Schema, listing, nullable, record, reference
from server.stored_files.record import Purpose
from server.stored_files.uploads import UploadState
from server.vector_stores.records import AttachmentStatus

TEMPLATE = "#/components/schemas/{model}"

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}

RESIDENCY = record(
    tier=STRING,
    load_seconds=nullable(NUMBER),
    evicts={"type": "array", "items": STRING},
)

ERROR = record(
    error=record(
        message=STRING,
        type=STRING,
        param=nullable(STRING),
        code=nullable(STRING),
        optional={"residency": RESIDENCY},
    )
)

ANTHROPIC_ERROR = record(
    type={"const": "error"},
    error=record(type=STRING, message=STRING, optional={"residency": RESIDENCY}),
    request_id=STRING,
)

OLLAMA_ERROR = record(error=STRING)

_MCP_ERROR = record(code=INTEGER, message=STRING, optional={"data": {}})
MCP_MESSAGE = record(
    jsonrpc={"const": "2.0"},
    optional={
        "id": {"type": ["string", "integer", "null"]},
        "method": STRING,
        "params": {"type": "object"},
        "result": {"type": "object"},
        "error": _MCP_ERROR,
    },
)
MCP_ERROR = record(jsonrpc={"const": "2.0"}, id={"type": "null"}, error=_MCP_ERROR)

_TEXTS: Schema = {"type": "array", "items": STRING}

OLLAMA_DETAILS = record(
    parent_model=STRING,
    format=STRING,
    family=STRING,
    families=_TEXTS,
    parameter_size=STRING,
    quantization_level=STRING,
)

_OLLAMA_TAG: dict[str, Schema] = {
    "name": STRING,
    "model": STRING,
    "size": {**INTEGER, "description": "Bytes."},
    "digest": STRING,
    "details": reference("OllamaDetails"),
}
OLLAMA_TAGS = record(
    models={"type": "array", "items": record(**_OLLAMA_TAG, modified_at=STRING)},
)
OLLAMA_RUNNING = record(
    models={
        "type": "array",
        "items": record(
            **_OLLAMA_TAG, expires_at=STRING, size_vram=INTEGER, context_length=INTEGER
        ),
    },
)
OLLAMA_SHOWN = record(
    modelfile=STRING,
    parameters=STRING,
    template=STRING,
    details=reference("OllamaDetails"),
    model_info={"type": "object"},
    capabilities=_TEXTS,
    modified_at=STRING,
)

_NANOSECONDS: Schema = {**INTEGER, "description": "Nanoseconds."}
_OLLAMA_END: dict[str, Schema] = {
    "logprobs": {"type": "array", "items": {"type": "object"}},
    "done_reason": {"enum": ["stop", "length", "load", "unload"]},
    "total_duration": _NANOSECONDS,
    "load_duration": _NANOSECONDS,
    "prompt_eval_count": INTEGER,
    "prompt_eval_duration": _NANOSECONDS,
    "eval_count": INTEGER,
    "eval_duration": _NANOSECONDS,
}
_OLLAMA_ANSWER: dict[str, Schema] = {"model": STRING, "created_at": STRING, "done": BOOLEAN}
OLLAMA_CHAT = record(
    **_OLLAMA_ANSWER,
    message=record(
        role={"const": "assistant"},
        content=STRING,
        optional={
            "thinking": STRING,
            "tool_calls": {
                "type": "array",
                "items": record(
                    function=record(index=INTEGER, name=STRING, arguments={"type": "object"}),
                    optional={"id": STRING},
                ),
            },
        },
    ),
    optional=_OLLAMA_END,
)
OLLAMA_GENERATED = record(
    **_OLLAMA_ANSWER, response=STRING, optional={"thinking": STRING, **_OLLAMA_END}
)
_VECTOR: Schema = {"type": "array", "items": NUMBER}
OLLAMA_EMBEDDINGS = record(
    model=STRING,
    embeddings={"type": "array", "items": _VECTOR},
    optional={
        "total_duration": _NANOSECONDS,
        "load_duration": _NANOSECONDS,
        "prompt_eval_count": INTEGER,
    },
)
OLLAMA_EMBEDDING = record(embedding=_VECTOR)

IMAGES = record(
    created=INTEGER,
    data={
        "type": "array",
        "items": {"anyOf": [record(b64_json=STRING), record(url=STRING)]},
    },
    background={"const": "opaque"},
    output_format={"enum": ["png", "jpeg", "webp"]},
    optional={
        "seed": {
            **INTEGER,
            "description": "The seed of the first image, unless a provider keeps it to itself.",
        },
        "size": STRING,
        "quality": STRING,
    },
)

VIDEO = record(
    id=STRING,
    object={"const": "video"},
    model=STRING,
    status={"enum": ["queued", "in_progress", "completed", "failed"]},
    progress={**INTEGER, "minimum": 0, "maximum": 100},
    created_at=INTEGER,
    completed_at=nullable(INTEGER),
    expires_at=nullable(INTEGER),
    prompt=nullable(STRING),
    size=STRING,
    seconds=STRING,
    remixed_from_video_id={"type": "null"},
    error=nullable(record(code=STRING, message=STRING)),
    fps=INTEGER,
    num_frames=INTEGER,
    seed=nullable(INTEGER),
    cut={
        "type": "array",
        "items": record(param=STRING, kept=INTEGER, given=INTEGER),
        "description": "Texts that were too long for the model, in tokens.",
    },
    position={**nullable(INTEGER), "description": "In the queue; 1 is next."},
    eta_s={**nullable(NUMBER), "description": "Seconds until it is expected to be done."},
)

_ITEMS: Schema = {"type": "array", "items": record(id=STRING, type=STRING)}

RESPONSE = record(
    id=STRING,
    object={"const": "response"},
    status={"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
    created_at=INTEGER,
    model=STRING,
    output=_ITEMS,
    error=nullable(record(code=STRING, message=STRING)),
    metadata={"type": "object", "additionalProperties": STRING},
    background=BOOLEAN,
    store=BOOLEAN,
    previous_response_id=nullable(STRING),
    conversation=nullable(record(id=STRING)),
)

COMPACTION = record(
    id=STRING,
    object={"const": "response.compaction"},
    created_at=INTEGER,
    output=_ITEMS,
    usage=nullable({"type": "object"}),
)

CONVERSATION = record(
    id=STRING,
    object={"const": "conversation"},
    created_at=INTEGER,
    metadata={"type": "object", "additionalProperties": STRING},
)

ITEM_LIST = listing(
    record(id=STRING, type=STRING), first_id=STRING, last_id=STRING, has_more=BOOLEAN
)

STORED_FILE = record(
    id=STRING,
    object={"const": "file"},
    bytes=INTEGER,
    created_at=INTEGER,
    filename=STRING,
    purpose={"enum": [purpose.value for purpose in Purpose]},
    status={"const": "processed"},
    optional={"expires_at": INTEGER},
)

UPLOAD = record(
    id=STRING,
    object={"const": "upload"},
    bytes=INTEGER,
    created_at=INTEGER,
    expires_at=INTEGER,
    filename=STRING,
    purpose=STRING,
    status={"enum": [state.value for state in UploadState]},
    file=nullable(reference("File")),
)

BATCH = record(
    id=STRING,
    object={"const": "batch"},
    endpoint=STRING,
    input_file_id=STRING,
    completion_window=STRING,
    status={"enum": [state.value for state in BatchState]},
    created_at=INTEGER,
    expires_at=INTEGER,
    request_counts=record(total=INTEGER, completed=INTEGER, failed=INTEGER),
    usage=record(
        input_tokens=INTEGER,
        input_tokens_details=record(cached_tokens=INTEGER),
        output_tokens=INTEGER,
        output_tokens_details=record(reasoning_tokens=INTEGER),
        total_tokens=INTEGER,
    ),
    metadata=nullable({"type": "object", "additionalProperties": STRING}),
    optional={
        **dict.fromkeys(
            (
                "in_progress_at",
                "finalizing_at",
                "completed_at",
                "failed_at",
                "expired_at",
                "cancelling_at",
                "cancelled_at",
            ),
            INTEGER,
        ),
        "output_file_id": STRING,
        "error_file_id": STRING,
        "errors": listing(
            record(code=STRING, message=STRING, param=nullable(STRING), line=nullable(INTEGER))
        ),
    },
)

_STATUS: Schema = {"enum": [status.value for status in AttachmentStatus]}
_ATTRIBUTES: Schema = {
    "type": "object",
    "additionalProperties": {"anyOf": [STRING, NUMBER, BOOLEAN]},
}
_FILE_COUNTS = record(**{status.value: INTEGER for status in AttachmentStatus}, total=INTEGER)

VECTOR_STORE = record(
    id=STRING,
    object={"const": "vector_store"},
    created_at=INTEGER,
    name=STRING,
    description=nullable(STRING),
    usage_bytes=INTEGER,
    file_counts=_FILE_COUNTS,
    status={"enum": ["expired", "in_progress", "completed"]},
    expires_at=nullable(INTEGER),
    last_active_at=INTEGER,
    metadata=nullable({"type": "object", "additionalProperties": STRING}),
    optional={"expires_after": record(anchor={"const": "last_active_at"}, days=INTEGER)},
)

VECTOR_STORE_FILE = record(
    id=STRING,
    object={"const": "vector_store.file"},
    created_at=INTEGER,
    vector_store_id=STRING,
    usage_bytes=INTEGER,
    status=_STATUS,
    last_error=nullable(
        record(code={"enum": ["server_error", "unsupported_file", "invalid_file"]}, message=STRING)
    ),
    chunking_strategy=record(
        type={"const": "static"},
        static=record(max_chunk_size_tokens=INTEGER, chunk_overlap_tokens=INTEGER),
    ),
    attributes=_ATTRIBUTES,
)

VECTOR_STORE_FILE_BATCH = record(
    id=STRING,
    object={"const": "vector_store.files_batch"},
    created_at=INTEGER,
    vector_store_id=STRING,
    status=_STATUS,
    file_counts=_FILE_COUNTS,
)

SEARCH_RESULTS = record(
    object={"const": "vector_store.search_results.page"},
    search_query={"type": "array", "items": STRING},
    data={
        "type": "array",
        "items": record(
            file_id=STRING,
            filename=STRING,
            score=NUMBER,
            attributes=_ATTRIBUTES,
            content={"type": "array", "items": record(type={"const": "text"}, text=STRING)},
        ),
    },
    has_more=BOOLEAN,
    next_page={"type": "null"},
)

WORD = record(word=STRING, start=NUMBER, end=NUMBER)

SEGMENT = record(
    id=INTEGER,
    seek=INTEGER,
    start=NUMBER,
    end=NUMBER,
    text=STRING,
    tokens={"type": "array", "items": INTEGER},
    temperature=NUMBER,
    avg_logprob=NUMBER,
    compression_ratio=NUMBER,
    no_speech_prob=NUMBER,
)

SPOKEN_SEGMENT = record(
    type={"const": "transcript.text.segment"},
    id=STRING,
    start=NUMBER,
    end=NUMBER,
    text=STRING,
    speaker=STRING,
)

TRANSCRIPT = record(
    text=STRING,
    optional={
        "usage": record(type={"const": "duration"}, seconds=NUMBER),
        "task": STRING,
        "language": STRING,
        "duration": NUMBER,
        "segments": {"type": "array", "items": {"anyOf": [SEGMENT, SPOKEN_SEGMENT]}},
        "words": {"type": "array", "items": WORD},
    },
)

_VOICE = {"id": STRING, "object": {"const": "audio.voice"}, "name": STRING}
CLONED_VOICE = record(**_VOICE, created_at=INTEGER)
LISTED_VOICE = record(
    **_VOICE,
    model=nullable(STRING),
    language=nullable(STRING),
    optional={"created_at": INTEGER},
)

EVENT = record(
    id=INTEGER,
    at={**NUMBER, "description": "Unix seconds."},
    type={"enum": [kind.value for kind in EventKind]},
    model=STRING,
    reason=STRING,
    request_id=nullable(STRING),
    granted_bytes=INTEGER,
    capacity_bytes=INTEGER,
)

EVENT_PAGE = listing(
    reference("Event"),
    has_more=BOOLEAN,
    last_id=INTEGER,
    lost=nullable(record(type={"const": "lost"}, count=nullable(INTEGER))),
)

FILES = record(
    source=STRING,
    nbytes=INTEGER,
    unfinished_bytes=INTEGER,
    present=BOOLEAN,
    last_used={**nullable(NUMBER), "description": "Unix seconds."},
    models={"type": "array", "items": STRING},
)

MODEL_FILES = record(
    id=STRING,
    object={"const": "engine.files"},
    source=STRING,
    hub={**BOOLEAN, "description": "Whether a hub has it, so that it can be pulled."},
    files={"type": "array", "items": reference("Files")},
)

DELETED_FILES = record(
    id=STRING,
    object={"const": "engine.files"},
    deleted={"type": "array", "items": STRING},
    freed_bytes=INTEGER,
)

ROUTE_MODEL = record(
    id=STRING,
    object={"const": "model"},
    created=INTEGER,
    owned_by=STRING,
    choose={"type": "array", "items": STRING, "description": "The models that it chooses from."},
)

_SCORE = record(score=NUMBER, parts={"type": "object", "additionalProperties": NUMBER})

ROUTE = record(
    object={"const": "engine.route"},
    route=STRING,
    model={**nullable(STRING), "description": "The choice; null if none can do it."},
    prefer=nullable({"enum": [each.value for each in Preference]}),
    needed_quality=NUMBER,
    complexity=nullable(_SCORE),
    options={
        "type": "array",
        "items": record(
            model=STRING,
            capable=BOOLEAN,
            reason={**nullable(STRING), "description": "Why it cannot be chosen."},
            quality=NUMBER,
            price={**nullable(NUMBER), "description": "Dollars, as expected."},
            seconds={**nullable(NUMBER), "description": "Until the whole answer."},
            cost={**nullable(NUMBER), "description": "The price and what the time is worth."},
        ),
    },
)

LISTED_LORA = record(
    id=STRING,
    object={"const": "engine.lora"},
    model=STRING,
    nbytes={**nullable(INTEGER), "description": "Null if it is not in the model's folder."},
)

DELETED_LORA = record(
    id=STRING,
    object={"const": "engine.lora"},
    model=STRING,
    deleted={"const": True},
    freed_bytes=INTEGER,
)

LORA = record(id=STRING, object={"const": "engine.lora"}, model=STRING, nbytes=INTEGER)

CACHE = record(
    store={"enum": ["off", "sqlite", "redis"]},
    optional={
        "off_reason": {**nullable(STRING), "description": "Why it keeps nothing any more."},
        "shared": BOOLEAN,
        "entries": {**nullable(INTEGER), "description": "Null in Redis, as are the bytes."},
        "bytes": nullable(INTEGER),
        "max_bytes": nullable(INTEGER),
        "max_age_s": {**nullable(NUMBER), "description": "Null is for ever."},
        "requests": {
            "type": "object",
            "description": "Requests by what the cache did, since the start.",
            "additionalProperties": INTEGER,
        },
    },
)

_COUNTS = dict.fromkeys(COUNTS, NUMBER)
USAGE_ROW = record(optional=dict.fromkeys(GROUPS, STRING), **_COUNTS)
USAGE = listing(
    USAGE_ROW,
    by={"type": "array", "items": {"enum": [*GROUPS]}},
    since=nullable(STRING),
    until=nullable(STRING),
    total=record(**_COUNTS),
    budgets={"type": "array", "items": reference("BudgetStatus")},
)

STATUS = record(status={"enum": [*(state.value for state in EngineState), "restarting"]})


def components() -> dict[str, Any]:
    """All of them by name."""
    status = _of_dataclass(EngineStatus)
    forecast = _of_dataclass(Forecast)
    provider = _of_dataclass(ProviderStatus)
    found = {**status.pop("$defs"), **forecast.pop("$defs"), **provider.pop("$defs")}
    model = found[ModelStatus.__name__]
    model["properties"]["keep_alive_s"] = {
        **nullable(NUMBER),
        "description": "Seconds that the idle model stays; null is for ever.",
    }
    own = {
        "object": {"const": "model"},
        "owned_by": STRING,
        "input_modalities": {
            **nullable({"type": "array", "items": STRING}),
            "description": "What a request may hold: `text`, `image`, `audio`, `video`; null if"
            " nobody knows.",
        },
        "alias_of": {**nullable(STRING), "description": "The model's id; null if this is the id."},
        "parent": {**nullable(STRING), "description": "The id of the model that a LoRA adapts."},
    }
    found["LedgerStatus"]["properties"]["foreign_bytes"] = {
        **INTEGER,
        "deprecated": True,
        "description": "The former name of `external_bytes`.",
    }
    # Under an alias, `id` is the alias.
    found["Model"] = {
        **model,
        "properties": {**model["properties"], **own},
        "required": [*model["required"], *own],
    }
    return {
        **found,
        "EngineStatus": status,
        "Plan": forecast,
        "RouteModel": ROUTE_MODEL,
        "ModelList": listing({"anyOf": [reference("Model"), reference("RouteModel")]}),
        "Route": ROUTE,
        "Images": IMAGES,
        "Response": RESPONSE,
        "Compaction": COMPACTION,
        "Conversation": CONVERSATION,
        "ItemList": ITEM_LIST,
        "File": STORED_FILE,
        "FileList": listing(reference("File"), first_id=STRING, last_id=STRING, has_more=BOOLEAN),
        "Upload": UPLOAD,
        "Batch": BATCH,
        "BatchList": {
            **listing(reference("Batch"), first_id=STRING, last_id=STRING, has_more=BOOLEAN),
            "required": ["object", "data", "has_more"],
        },
        "VectorStore": VECTOR_STORE,
        "VectorStoreList": listing(
            reference("VectorStore"), first_id=STRING, last_id=STRING, has_more=BOOLEAN
        ),
        "VectorStoreFile": VECTOR_STORE_FILE,
        "VectorStoreFileList": listing(
            reference("VectorStoreFile"), first_id=STRING, last_id=STRING, has_more=BOOLEAN
        ),
        "VectorStoreFileBatch": VECTOR_STORE_FILE_BATCH,
        "SearchResults": SEARCH_RESULTS,
        "Video": VIDEO,
        "VideoList": listing(
            reference("Video"),
            first_id=nullable(STRING),
            last_id=nullable(STRING),
            has_more=BOOLEAN,
        ),
        "Transcript": TRANSCRIPT,
        "ClonedVoice": CLONED_VOICE,
        "VoiceList": listing(
            LISTED_VOICE, voices={"type": "array", "items": record(id=STRING, name=STRING)}
        ),
        "Event": EVENT,
        "EventPage": EVENT_PAGE,
        "Files": FILES,
        "FilesList": listing(MODEL_FILES),
        "DeletedFiles": DELETED_FILES,
        "AddedLora": LORA,
        "ResponseCache": CACHE,
        "ClearedCache": record(removed_entries=INTEGER),
        "LoraList": listing(LISTED_LORA),
        "DeletedLora": DELETED_LORA,
        "Status": STATUS,
        "ProviderList": listing(provider),
        "Usage": USAGE,
        "BudgetStatus": _of_dataclass(BudgetStatus),
        "Error": ERROR,
        "AnthropicError": ANTHROPIC_ERROR,
        "OllamaError": OLLAMA_ERROR,
        "McpMessage": MCP_MESSAGE,
        "McpError": MCP_ERROR,
        "OllamaDetails": OLLAMA_DETAILS,
        "OllamaTags": OLLAMA_TAGS,
        "OllamaRunning": OLLAMA_RUNNING,
        "OllamaShown": OLLAMA_SHOWN,
        "OllamaChat": OLLAMA_CHAT,
        "OllamaGenerated": OLLAMA_GENERATED,
        "OllamaEmbeddings": OLLAMA_EMBEDDINGS,
        "OllamaEmbedding": OLLAMA_EMBEDDING,
    }


def _of_dataclass(kind: type[Any]) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(
        mode="serialization", ref_template=TEMPLATE, schema_generator=SchemaGenerator
    )
