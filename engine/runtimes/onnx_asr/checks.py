"""What a model in ONNX cannot do for a request. Its kind is enough to know."""

from __future__ import annotations

from engine.errors import InvalidRequest
from engine.requests import TranscriptionOperation, TranscriptionRequest
from engine.runtimes.onnx_asr.options import ModelType, OnnxAsrOptions
from engine.words import echoed

CANARY: ModelType = "nemo-conformer-aed"

CANARY_DEFAULT = "en"
"""What onnx-asr tells Canary where nobody names a language: it cannot detect one."""

UNKNOWN = "und"
"""BCP 47's code for a language that nobody knows."""


def check_request(request: TranscriptionRequest) -> None:
    """Refuse what no such model takes.

    Raises:
        InvalidRequest: naming the field at fault.

    """
    name = echoed(request.model)
    if request.temperature > 0:
        raise InvalidRequest(
            f"The model {name} takes the likeliest text only: temperature must be 0.",
            param="temperature",
        )
    for param, text in (("prompt", request.prompt), ("hotwords", request.hotwords)):
        if text:
            raise InvalidRequest(f"The model {name} takes no {param}.", param=param)


def check_kind(request: TranscriptionRequest, options: OnnxAsrOptions, kind: ModelType) -> None:
    """Refuse what a model of this kind does not take.

    Raises:
        InvalidRequest: naming the field at fault.

    """
    name = echoed(request.model)
    if kind == CANARY:
        if request.word_times:
            raise InvalidRequest(
                f"The model {name} does not say when a word was spoken.",
                param="timestamp_granularities",
            )
        return
    if request.operation is TranscriptionOperation.TRANSLATION:
        raise InvalidRequest(f"The model {name} does not translate.", param="model")
    if request.language is not None and request.language.lower() != options.language:
        raise InvalidRequest(
            f"The model {name} detects the language: leave out language.",
            param="language",
        )


def language_of(request: TranscriptionRequest, options: OnnxAsrOptions, kind: ModelType) -> str:
    """The language of the recording, as far as anybody said it."""
    said = request.language or options.language
    if said is None:
        return CANARY_DEFAULT if kind == CANARY else UNKNOWN
    return said.lower()
