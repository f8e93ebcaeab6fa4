"""How hard a request is: a score of plain signs, whose weights are configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.requests import Request, TextRequest
from engine.route_config import ComplexityConfig
from engine.routing.prompt_text import prompt_text

SIGNS = 3
"""So many different signs of a kind make its part 1."""

MOST_READ = 100_000
"""Characters of a prompt that are looked through; its whole length counts."""

_CODE = re.compile(
    r"```|\b(?:def|class|function|const|import|select|struct|lambda)\b(?=[\s\w]*[(:{=*])"
    r"|\b(?:bug|code|compile|debug|function|implement|program|refactor|regex|script|sql"
    r"|stack ?trace|traceback|unit tests?)\b",
    re.IGNORECASE,
)
_MATHEMATICS = re.compile(
    r"[∑∫√∂≤≥≠∞π]|\\(?:frac|sum|int|sqrt|begin)|\d\s*[-+*/^=]\s*\d|\b\w\s*\^\s*\d"
    r"|\b(?:calculate|derivative|equation|integral|matrix|polynomial|probability|proof|prove|solve"
    r"|theorem)\b",
    re.IGNORECASE,
)
_REASONING = re.compile(
    r"\b(?:step by step|why|compare|contrast|trade-?offs?|plan|design|strategy|analy[sz]e|evaluate"
    r"|argue|pros and cons|reason|think)\b",
    re.IGNORECASE,
)
_EFFORTS = {"minimal": 0.0, "none": 0.0, "low": 0.3, "medium": 0.6, "high": 1.0, "xhigh": 1.0}


@dataclass(frozen=True, slots=True)
class Complexity:
    """The score of one request, 0 (simple) to 1 (hard), and the parts that it was made of."""

    score: float
    parts: Mapping[str, float]


def complexity(
    request: Request, weights: ComplexityConfig, likeness: float | None = None
) -> Complexity:
    """The score of a request. `likeness` is how like the hard examples it is, 0 to 1, if known.

    It is 1 - Π (1 - weight × part): one strong sign is enough, and several add up.
    """
    text = prompt_text(request)
    read = text[:MOST_READ]
    parts = {
        "length": min(1.0, len(text) / weights.long),
        "code": _signs(_CODE, read),
        "mathematics": _signs(_MATHEMATICS, read),
        "reasoning": max(_signs(_REASONING, read), _asked_effort(request)),
    }
    simple = 1.0
    for name, part in parts.items():
        simple *= 1 - getattr(weights, name) * part
    if likeness is not None and weights.examples is not None:
        parts["examples"] = likeness
        simple *= 1 - weights.examples.weight * likeness
    return Complexity(1 - simple, parts)


def _signs(pattern: re.Pattern[str], text: str) -> float:
    found: set[str] = set()
    for match in pattern.finditer(text):
        found.add(match[0].lower())
        if len(found) == SIGNS:
            return 1.0
    return len(found) / SIGNS


def _asked_effort(request: Request) -> float:
    """The reasoning that the request itself asks for, in any of the three dialects."""
    if not isinstance(request, TextRequest):
        return 0.0
    body = request.body
    reasoning: Any = body.get("reasoning")
    effort = body.get("reasoning_effort")
    if effort is None and isinstance(reasoning, Mapping):
        effort = reasoning.get("effort")
    if isinstance(effort, str):
        return _EFFORTS.get(effort, 0.0)
    thinking = body.get("thinking")
    return 1.0 if isinstance(thinking, Mapping) and thinking.get("type") == "enabled" else 0.0
