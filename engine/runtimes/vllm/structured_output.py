"""vLLM's manager of structured output, with a backend for each kind of grammar.

vLLM builds one backend for an engine at its first structured request, on the thread that steps all
models: half a second for a vocabulary of 128,000 tokens. That request also decides which backend:
after an ordinary schema, rules that only the other one knows were dropped in silence.

Importing this module imports vLLM.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher

import vllm.v1.engine.core as vllm_core_module
import vllm.v1.structured_output.backend_xgrammar as vllm_xgrammar_module
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import (
    GuidanceBackend,
    process_for_additional_properties,
    serialize_guidance_grammar,
)
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

USUAL = "xgrammar"
"""The backend of all grammars that it can express."""

GUIDANCE = "guidance"
"""The backend of JSON schemas with rules that the usual one ignores. It refuses what it cannot."""

IGNORED = frozenset(
    {"$dynamicRef", "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "not"}
    | {"contains", "maxContains", "minContains", "multipleOf", "then", "uniqueItems"}
)
"""Rules that xgrammar ignores everywhere."""

RULES_OF_A_KIND = frozenset(
    {"exclusiveMaximum", "exclusiveMinimum", "format", "maxItems", "maxLength", "maxProperties"}
    | {"maximum", "minItems", "minLength", "minProperties", "minimum", "pattern", "required"}
)
"""Rules that xgrammar ignores where it does not see what kind of value they are about."""

KINDS = frozenset({"additionalProperties", "items", "prefixItems", "properties", "type"})
"""What shows it that kind."""

ALONE = frozenset({"$ref", "allOf", "anyOf", "const", "enum", "oneOf"})
"""Rules beside which xgrammar ignores all others."""

MAPS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
DATA = frozenset({"const", "default", "enum", "examples"})


class PreparedManager(StructuredOutputManager):  # type: ignore[misc]
    """Builds backends on threads of its own, and the usual one while the model loads."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.backend: Any = None
        self._backends: dict[str, Any] = {}
        self._building = threading.Lock()
        model = vllm_config.model_config
        if model.runner_type == "generate" and not model.skip_tokenizer_init:
            self.executor.submit(self._backend, USUAL)

    def _backend(self, name: str) -> Any:
        with self._building:
            if name not in self._backends:
                self._backends[name] = _backend_class(name)(
                    self.vllm_config,
                    tokenizer=self.tokenizer,
                    vocab_size=self.vllm_config.model_config.get_vocab_size(),
                )
                # The masks of all have one form. vLLM asks the first for the memory of a batch.
                self.backend = next(iter(self._backends.values()))
            return self._backends[name]

    def grammar_init(self, request: Any) -> None:
        """Begin to compile the request's grammar."""
        wanted = request.structured_output_request
        if wanted is not None:
            wanted.grammar = self.executor.submit(self._create_grammar, request)

    def _create_grammar(self, request: Any) -> Any:
        parameters = request.sampling_params
        kind, text = request.structured_output_request.structured_output_key
        name = parameters.structured_outputs._backend
        if name == USUAL and kind is StructuredOutputOptions.JSON and has_lengths(json.loads(text)):
            closed = json.dumps(process_for_additional_properties(text))
            if self._guidance_takes(closed):
                name, text = GUIDANCE, closed
        return self._backend(name).compile_grammar(
            kind, text, stop_token_ids=parameters.all_stop_token_ids
        )

    def _guidance_takes(self, schema: str) -> bool:
        if not GuidanceBackend.is_tokenizer_supported(self.tokenizer):
            return False
        grammar = serialize_guidance_grammar(StructuredOutputOptions.JSON, schema)
        return not LLMatcher.validate_grammar(grammar)

    def clear_backend(self) -> None:
        """End the threads, and drop the backends."""
        super().clear_backend()
        self._backends.clear()


def has_lengths(schema: Any) -> bool:
    """Whether a string of the schema has a least or a most length.

    xgrammar 0.2 lets such a string hold control characters as they are, and that is no JSON. So
    the other backend serves it. Both forbid properties that the schema does not name.
    """
    if isinstance(schema, list):
        return any(map(has_lengths, schema))
    if not isinstance(schema, dict):
        return False
    bounds = (schema.get("minLength"), schema.get("maxLength"))
    return any(isinstance(each, int) for each in bounds) or any(map(has_lengths, schema.values()))


def has_ignored_rules(schema: Any) -> bool:
    """Whether xgrammar would ignore some rule of the schema in silence."""
    if not isinstance(schema, dict):
        return False
    rules = schema.keys() & (ALONE | RULES_OF_A_KIND | KINDS)
    alone = rules & ALONE
    others = rules - alone - ({"type"} if alone & {"const", "enum"} else set())
    reference = schema.get("$ref", "#")
    return (
        bool(schema.keys() & IGNORED)
        or (bool(alone) and (len(alone) > 1 or bool(others)))
        or (bool(rules & RULES_OF_A_KIND) and not rules & KINDS)
        or (isinstance(reference, str) and not reference.startswith("#"))
        or any(map(has_ignored_rules, _schemas_in(schema)))
    )


def _schemas_in(schema: dict[str, Any]) -> Iterator[Any]:
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list) and key not in DATA:
            yield from value
        elif key not in DATA:
            yield value


def _backend_class(name: str) -> Any:
    known = {USUAL: XgrammarBackend, GUIDANCE: GuidanceBackend}
    if name in known:
        return known[name]
    from vllm.v1.structured_output.backend_outlines import OutlinesBackend

    return OutlinesBackend  # for what neither of the two can express


def prepare_structured_output() -> None:
    """Have vLLM use the class above. Call once, before the first engine."""
    vllm_core_module.StructuredOutputManager = PreparedManager
    known = vllm_xgrammar_module.has_xgrammar_unsupported_json_features

    @functools.wraps(known)
    def is_beyond_usual(schema: dict[str, Any]) -> bool:
        return bool(known(schema)) or has_ignored_rules(schema)

    vllm_xgrammar_module.has_xgrammar_unsupported_json_features = is_beyond_usual
