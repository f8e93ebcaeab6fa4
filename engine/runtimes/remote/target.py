"""A configured model at its provider: where it is, the key for it, and how it has behaved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from engine.config import ModelConfig
from engine.errors import LoadFailed
from engine.runtimes.remote.address import Address
from engine.runtimes.remote.latency import Latency
from engine.runtimes.remote.options import RemoteOptions
from engine.runtimes.remote.rate_limits import RateLimits
from engine.runtimes.remote.secret import LEAST_CHARS_IN_ANSWERS, Secret

ANTHROPIC_VERSION = "2023-06-01"


class Target:
    """One model of one provider."""

    def __init__(self, model: ModelConfig, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds.

        Raises:
            LoadFailed: the source is no address.

        """
        self.model_id = model.id
        self.options = options = model.options_as(RemoteOptions)
        try:
            self.address = Address.of(model.source)
        except ValueError as error:
            raise LoadFailed(f"source: {error}") from None
        self._key = None if options.api_key is None else Secret(options.api_key)
        self._headers = {name: Secret(value) for name, value in options.headers.items()}
        self.limits = RateLimits(options.requests_per_minute, options.tokens_per_minute, clock)
        self.latencies: defaultdict[str, Latency] = defaultdict(Latency)
        """By the kind of answer: a whole answer takes longer to its first byte than a stream."""

    def headers(self, *, anthropic: bool = False, again: bool = False) -> dict[str, str]:
        """The headers that say who asks. With `again` the files of keys are read anew.

        Raises:
            LoadFailed: a key is missing.

        """
        found = {name.lower(): each.read(again=again) for name, each in self._headers.items()}
        if anthropic:
            found.setdefault("anthropic-version", ANTHROPIC_VERSION)
        if self._key is not None:
            name = self.options.key_header or ("x-api-key" if anthropic else None)
            key = self._key.read(again=again)
            found |= {"authorization": f"Bearer {key}"} if name is None else {name.lower(): key}
        return found

    def hide(self, text: str) -> str:
        """The text without our keys."""
        for secret in (*self._headers.values(), *([self._key] if self._key else [])):
            text = secret.hide(text)
        return text

    def hide_in_answer(self, text: str) -> str:
        """The text of an answer without our key. Other headers are no secrets by themselves."""
        return text if self._key is None else self._key.hide(text, LEAST_CHARS_IN_ANSWERS)

    def is_own(self, host: str | None) -> bool:
        """Whether a host is the provider's own."""
        return host is not None and host == self.address.host
