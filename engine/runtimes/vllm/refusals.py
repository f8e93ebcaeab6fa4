"""vLLM's and pydantic's words for what is wrong with a request, in words for its client.

A client can act on the name of a field and the rule. It cannot act on the names of classes, the
branches of a union, or options of a server that it does not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from engine.errors import InvalidRequest
from engine.words import echoed, without_folders

Path = tuple[str | int, ...]

_SUFFIX = re.compile(r"\s*\((?:parameter|value)=.*\)$", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_ADVICE = re.compile(r"--[a-z]|VLLM_[A-Z]|\bvLLM\b|errors\.pydantic\.dev|environment variable")
_INSTANCE = re.compile(r" or (?:an )?instance of \w+")
_GRAMMAR = re.compile(r"[Gg]rammar|regex|Choice|JSON schema")
_PROMPT = re.compile(r"\bprompt\b|Token id|conversation")
_FIRST_WORD = re.compile(r"`?(\w+(?:\.\w+)*)`?")

TAGS = ("role", "type")
"""Fields by whose value a client says which branch of a union it means."""

PROMPTS = ("messages", "input", "prompt", "documents", "items", "text_2", "data_2")
"""Fields for what vLLM calls `input_tokens`."""

LENGTHS = ("max_completion_tokens", "max_output_tokens")
"""Fields that vLLM calls `max_tokens`."""

GRAMMARS = ("structured_outputs", "response_format", "text", "tools")
"""Fields that become a grammar."""


def invalid(error: ValidationError, body: Any, prefix: Path = ()) -> InvalidRequest:
    """The refusal for the error that says most, of all branches of all unions.

    `body` is what was checked. `prefix` is where it stands in the client's document.
    """
    found = error.errors(include_url=False, include_context=False)
    path, message = _best([(tuple(each["loc"]), each) for each in found], body, prefix)
    param = _written(path)
    message = message.removeprefix("Value error, ").removeprefix(f"{param}: ")
    if not param:
        return refusal(message, None, body)
    return InvalidRequest(f"{param}: {message}", param=param)


def refusal(message: str, param: str | None, body: Any, *, status: int = 400) -> InvalidRequest:
    """The refusal for an error of vLLM's, which names a field of the body where it can."""
    message = plain(message)
    sent = body if isinstance(body, Mapping) else {}
    limit = next((each for each in LENGTHS if sent.get(each) is not None), None)
    if limit and (param == "max_tokens" or message.startswith("max_tokens")):
        message, param = message.replace("max_tokens", limit), limit
    if not _is_sent(param, body):
        word = _FIRST_WORD.match(message)
        if word and _is_sent(word[1], body):
            param = word[1]
        elif param or _PROMPT.search(message):
            param = next((each for each in PROMPTS if each in body), None)
        elif _GRAMMAR.search(message):
            param = next((each for each in GRAMMARS if each in body), None)
        elif "dimensions" in message and "dimensions" in sent:
            param = "dimensions"
    return InvalidRequest(message, param=param, status=status)


def _is_sent(param: str | None, body: Any) -> bool:
    return bool(param) and isinstance(body, Mapping) and re.split(r"[.\[]", param or "")[0] in body


def plain(message: str) -> str:
    """The message without folders of the server, and without advice to whoever runs it."""
    message = without_folders(_SUFFIX.sub("", message))
    kept = [each for each in _SENTENCE.split(message) if not _ADVICE.search(each)]
    return " ".join(kept) or "The request asks for what this model is not set up for."


def _best(errors: Sequence[tuple[Path, Any]], value: Any, path: Path) -> tuple[Path, str]:
    """Path and message of the error to tell: `errors` are below `path`, where `value` stands."""
    fields: dict[str | int, list[tuple[Path, Any]]] = {}
    branches: dict[str | int, list[tuple[Path, Any]]] = {}
    here = []
    for rest, error in errors:
        if not rest:
            here.append(error)
        elif _is_field(rest, error, value):
            fields.setdefault(rest[0], []).append((rest[1:], error))
        else:
            branches.setdefault(rest[0], []).append((rest[1:], error))
    if branches:
        apart = [each for key, found in branches.items() for each in _apart(key, found)]
        return _best_branch(apart, value, path)
    if fields:
        key, below = next(iter(fields.items()))
        return _best(below, _item(value, key), (*path, key))
    return path, " or ".join(dict.fromkeys(_rule(each) for each in here))


def _apart(
    key: str | int, errors: Sequence[tuple[Path, Any]]
) -> Sequence[Sequence[tuple[Path, Any]]]:
    """The errors of each branch, where pydantic names several by the one function around them.

    The tag is the first field of each, so a wrong tag begins the errors of another branch.
    """
    if not str(key).startswith("function-"):
        return [errors]
    found: list[list[tuple[Path, Any]]] = [[]]
    for rest, error in errors:
        if found[-1] and len(rest) == 1 and _is_wrong_tag(rest, error):
            found.append([])
        found[-1].append((rest, error))
    return found


def _best_branch(
    branches: Sequence[Sequence[tuple[Path, Any]]], value: Any, path: Path
) -> tuple[Path, str]:
    """Of the branch that the client seems to mean: that of its tag, otherwise of the right kind."""
    tagged = [each for each in branches if not any(_is_wrong_tag(rest, e) for rest, e in each)]
    if not tagged:
        wrong = [pair for each in branches for pair in each if _is_wrong_tag(*pair)]
        tag = next(str(part) for part in wrong[0][0] if part in TAGS)
        rules = dict.fromkeys(_rule(error) for rest, error in wrong if tag in rest)
        names = re.findall(r"'[^']*'", " ".join(rules))
        given = _item(value, tag)
        return (*path, tag), f"{echoed(given)} is none of {', '.join(dict.fromkeys(names))}"
    kinds = [each for each in tagged if not all(_is_wrong_kind(*pair, value) for pair in each)]
    if not kinds:
        rules = dict.fromkeys(_rule(error) for each in tagged for _, error in each)
        return path, " or ".join([next(iter(rules)), *(_kind(each) for each in [*rules][1:])])
    return _best(min(kinds, key=_distance), value, path)


def _distance(branch: Sequence[tuple[Path, Any]]) -> tuple[bool, int, int]:
    """How far a branch is from what the client sent: what it lacks, then where it first fails."""
    lacks = any(len(rest) <= 2 and error["type"] == "missing" for rest, error in branch)
    depth = max(sum(isinstance(part, int) for part in rest) for rest, _ in branch)
    return lacks, -depth, len(branch)


def _is_field(rest: Path, error: Any, value: Any) -> bool:
    key = rest[0]
    if isinstance(key, int):
        return True
    if isinstance(value, Mapping) and key in value:
        return True
    return len(rest) == 1 and error["type"] == "missing"


def _is_wrong_tag(rest: Path, error: Any) -> bool:
    tags = [part for part in rest if isinstance(part, str) and part in TAGS]
    here = not any(isinstance(part, int) for part in rest)
    return here and error["type"] == "literal_error" and [*rest[-1:]] == tags


def _is_wrong_kind(rest: Path, error: Any, value: Any) -> bool:
    fields = value if isinstance(value, Mapping) else ()
    deeper = any(isinstance(part, int) or part in fields for part in rest)
    return not deeper and error["type"].endswith("_type")


def _rule(error: Any) -> str:
    return _INSTANCE.sub("", str(error["msg"])).replace(" after validation", "")


def _kind(rule: str) -> str:
    return rule.removeprefix("Input should be ")


def _item(value: Any, key: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        return value[key]
    return None


def _written(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")
