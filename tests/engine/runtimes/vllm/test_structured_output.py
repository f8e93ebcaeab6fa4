"""No rule of a JSON schema is ignored: a backend keeps to it, or the request is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar
from llguidance import LLMatcher, LLTokenizer

from engine.runtimes.vllm.structured_output import has_ignored_rules

pytestmark = pytest.mark.slow

NULL = {"type": "null"}
A: dict[str, Any] = {"type": "object", "properties": {"a": NULL}}
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"type": "string", "not": {"enum": ["x"]}}, '"x"'),
    ({**A, "dependentRequired": {"a": ["b"]}}, '{"a": null}'),
    ({**A, "dependentSchemas": {"a": {"required": ["b"]}}}, '{"a": null}'),
    ({**A, "dependencies": {"a": ["b"]}}, '{"a": null}'),
    ({"type": "integer", "if": {"const": 1}, "then": False}, "1"),
    ({"items": NULL, "uniqueItems": True}, "[null, null]"),
    ({"contains": {"const": 1}}, "[2]"),
    ({"multipleOf": 7}, "3"),
    ({"pattern": "^a$"}, '"b"'),
    ({"minimum": 3}, "1"),
    ({"minItems": 3}, "[]"),
    ({"required": ["a"]}, "{}"),
    ({"$ref": "https://example.com/x"}, "5"),
    ({"enum": ["a", "b"], "pattern": "^b$"}, '"a"'),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}], "minimum": 5}, "1"),
    ({**A, "additionalProperties": False, "anyOf": [{"required": ["a"]}]}, "{}"),
    ({"$ref": "#/$defs/n", "minimum": 5, "$defs": {"n": {"type": "integer"}}}, "1"),
    ({"allOf": [{"type": "integer"}], "minimum": 5}, "1"),
    # xgrammar keeps to these.
    (A, '{"a": 1}'),
    ({"type": ["integer", "string"], "minimum": 5}, "1"),
    ({"type": "array", "items": NULL, "maxItems": 1}, "[null, null]"),
    ({"type": "object", "propertyNames": {"enum": ["a"]}}, '{"b": 1}'),
]


@pytest.mark.parametrize(("schema", "text"), BROKEN, ids=lambda each: json.dumps(each)[:60])
@pytest.mark.parametrize("within", [False, True])
def test_what_breaks_a_rule_is_never_written(
    schema: dict[str, Any], text: str, *, within: bool
) -> None:
    if within and "$ref" not in schema:
        schema, text = {"type": "array", "minItems": 1, "items": schema}, f"[{text}]"
    if has_ignored_rules(schema):
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        if not LLMatcher.validate_grammar(grammar):
            matcher = LLMatcher(LLTokenizer("byte"), grammar)
            taken = matcher.try_consume_tokens(list(text.encode()))
            assert taken < len(text) or not matcher.is_accepting()
    else:
        vocabulary = [bytes([byte]) for byte in range(256)]
        info = xgrammar.TokenizerInfo(
            [*vocabulary, b"</s>"], xgrammar.VocabType.RAW, stop_token_ids=[256]
        )
        compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema))
        usual = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
        assert not (usual.accept_string(text) and usual.is_terminated())


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"not": NULL, "if": NULL, "required": NULL}},
        {"enum": [{"not": 1}, ["if"]]},
        {"type": "string", "enum": ["a"], "default": {"not": 1}, "title": "x"},
        {"anyOf": [NULL, {"$ref": "#/$defs/a"}], "default": None, "$defs": {"a": A}},
        {"allOf": [{"$ref": "#/$defs/a"}], "description": "x", "$defs": {"a": A}},
        {"oneOf": [A, NULL], "discriminator": {"propertyName": "a"}},
        {"properties": {"a": NULL}, "required": ["a"]},
        {},
    ],
)
def test_ordinary_schemas_keep_the_usual_backend(schema: dict[str, Any]) -> None:
    assert not has_ignored_rules(schema)
