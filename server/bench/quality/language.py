"""What a language model knows, and how a batch, a dtype or a quantisation changes what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import sub

from server.bench.quality.client import Client, Said
from server.bench.quality.facts import FACTS, is_right
from server.bench.quality.measure import Measure, mean, share
from server.bench.quality.sentences import PASSAGES, QUESTIONS


@dataclass(frozen=True, slots=True)
class Language:
    """What a model said, or what a reference says."""

    name: str
    answers: tuple[Said, ...]
    """To `QUESTIONS`, each alone."""
    log_probabilities: tuple[tuple[float, ...], ...]
    """Of the tokens of `PASSAGES`, without the first of each."""


def listen(client: Client, model: str, tokens: int) -> Language:
    """Ask a model one question at a time, with at most so many tokens an answer."""
    return Language(
        model,
        tuple(client.ask(model, question, tokens) for question in QUESTIONS),
        tuple(tuple(client.log_probabilities(model, text)) for text in PASSAGES),
    )


def measure(client: Client, said: Language, references: Sequence[Language], tokens: int, batch: int
) -> list[Measure]:  # fmt: skip
    """The measures of the model that said so, against itself in a batch and against others."""
    batched = client.at_once(
        batch, lambda question: client.ask(said.name, question, tokens), QUESTIONS
    )
    values = [each for text in said.log_probabilities for each in text]
    return [
        known_facts([client.ask(said.name, question, tokens).text for question in FACTS]),
        same_answers(f"same answer, {batch} at once", said.answers, batched),
        mean("log probability of a token", values, "tokens", higher_is_better=True),
        *(each for other in references for each in compare(said, other)),
    ]


def known_facts(answers: Sequence[str]) -> Measure:
    """The share of `FACTS` that the answers have."""
    wrong = [
        f"{question} {answer!r}"
        for (question, words), answer in zip(FACTS.items(), answers, strict=True)
        if not is_right(answer, words)
    ]
    return share("facts known", len(FACTS) - len(wrong), len(FACTS), "facts", wrong)


def compare(said: Language, other: Language) -> list[Measure]:
    """How far a model is from a reference: in its answers, and in how probable it finds tokens."""
    found = [
        same_answers("same answer", said.answers, other.answers, part=f"against {other.name}"),
        same_tokens(said.answers, other.answers, part=f"against {other.name}"),
    ]
    pairs = list(zip(said.log_probabilities, other.log_probabilities, strict=True))
    if all(len(ours) == len(theirs) for ours, theirs in pairs):
        changes = [change for ours, theirs in pairs for change in map(sub, ours, theirs)]
        part = f"against {other.name}"
        found += [
            mean("change of log probability", changes, "tokens", higher_is_better=True, part=part),
            mean("distance of log probability", [abs(each) for each in changes], "tokens",
                higher_is_better=False, part=part),
        ]  # fmt: skip
    # Otherwise the two have other tokenizers, and the tokens cannot be paired.
    return found


def same_answers(
    name: str, answers: Sequence[Said], others: Sequence[Said], *, part: str = ""
) -> Measure:
    """The share of answers that are equal, character by character."""
    wrong = [
        f"{question} {answer.text!r}, not {other.text!r}"
        for question, answer, other in zip(QUESTIONS, answers, others, strict=True)
        if answer.text != other.text
    ]
    return share(name, len(QUESTIONS) - len(wrong), len(QUESTIONS), "answers", wrong, part=part)


def same_tokens(answers: Sequence[Said], others: Sequence[Said], *, part: str) -> Measure:
    """The share of the reference's tokens up to the first that differs in each answer."""
    equal = sum(
        equal_beginning(answer.tokens, other.tokens)
        for answer, other in zip(answers, others, strict=True)
    )
    return share(
        "same tokens up to the first other one", equal, sum(len(each.tokens) for each in others),
        "tokens", part=part,
    )  # fmt: skip


def equal_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two answers begin with before they differ."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))
