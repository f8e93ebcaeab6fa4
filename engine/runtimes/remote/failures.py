"""What went wrong at a provider: what a caller is told, and whether another try is worth it."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from typing import Any

import httpx

from engine.errors import EngineError, InvalidRequest, ProviderBusy, ProviderFailed, reason
from engine.runtimes.remote.rate_limits import USUAL_RETRY_S, retry_after_s
from engine.runtimes.remote.transport import PrivateAddress
from engine.words import shortened

OF_THE_REQUEST = frozenset({400, 404, 413, 415, 422})
"""Statuses that say that the request is wrong. It would be wrong a second time."""

OF_THE_KEY = frozenset({401, 402, 403})
"""Statuses about our key or account. What the provider says of them is not passed on: it may repeat
the key, and is none of a client's business."""

MAY_PASS = frozenset({408, 409, 425})
"""Of the statuses below 500 those that are worth another try, beside 429."""

NO_MONEY = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
"""Codes of a 429 that no waiting helps."""

NO_MONEY_RETRY_S = 60.0

MOST_SAID = 1000
"""Characters of a provider's own message."""


class Failure(Exception):
    """An attempt that failed."""

    def __init__(
        self,
        error: EngineError,
        *,
        retry: bool = False,
        after_s: float | None = None,
        alive: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry = retry
        """Whether the same request may succeed soon."""
        self.after_s = after_s
        """When to try again at the earliest, by the provider."""
        self.alive = alive
        """Whether the provider works as such, so that its breaker does not count this."""
        self.status = status


def of_status(
    provider: str, status: int, headers: Mapping[str, str], body: bytes, location: str | None
) -> Failure:
    """The failure for an answer that is none. `location` is the host of a redirect."""
    said, param, code = _said(body)
    if status in OF_THE_REQUEST:
        message = f"{said or 'It refused the request.'} (status {status} of {provider!r})"
        return Failure(InvalidRequest(message, param=param, status=status), alive=True)
    if status in OF_THE_KEY:
        account = "the account of the server" if status == 402 else "the key of the server"
        message = f"The provider {provider!r} refused {account} (status {status})."
        return Failure(ProviderFailed(message), alive=True, status=status)
    if status == 429:
        after_s = retry_after_s(headers)
        spent = code in NO_MONEY
        busy = ProviderBusy(
            f"The provider {provider!r} takes no more requests for now (status 429).",
            retry_after_s=NO_MONEY_RETRY_S if spent else after_s or USUAL_RETRY_S,
        )
        return Failure(busy, retry=not spent, after_s=after_s, alive=True, status=status)
    if 300 <= status < 400:
        message = (
            f"The provider {provider!r} redirects to {location or 'nowhere'} (status {status})."
        )
        return Failure(ProviderFailed(f"{message} Redirects are not followed: mend 'source'."))
    passes = status >= 500 or status in MAY_PASS
    message = f"The provider {provider!r} failed with status {status}"
    return Failure(
        ProviderFailed(f"{message}: {said}" if said else f"{message}."),
        retry=passes,
        after_s=retry_after_s(headers) if passes else None,
        alive=not passes,
        status=status,
    )


def of_error(provider: str, error: httpx.HTTPError | httpx.InvalidURL, *, begun: bool) -> Failure:
    """The failure for a connection that was not made, or broke. `begun`: the answer had begun."""
    cause = _root(error)
    words = reason(error)
    if isinstance(cause, PrivateAddress):
        return Failure(ProviderFailed(f"The provider {provider!r} is not reached: {cause}."))
    if isinstance(cause, ssl.SSLError) and not isinstance(error, httpx.TimeoutException):
        return Failure(ProviderFailed(f"The provider {provider!r} failed: TLS: {cause.reason}."))
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
        what = "was not reached in time" if not words or "Timeout" in words else words
        failed = ProviderFailed(f"The provider {provider!r} cannot be reached: {what}.")
        return Failure(failed, retry=True)
    when = "in the middle of its answer" if begun else "before it answered"
    failed = ProviderFailed(f"The provider {provider!r} broke the connection {when}.")
    return Failure(failed, retry=isinstance(error, httpx.TransportError | httpx.DecodingError))


def of_timeout(provider: str, what: str, seconds: float) -> Failure:
    """The failure for a provider that is silent. Who waited so long should not wait again."""
    return Failure(ProviderFailed(f"The provider {provider!r} {what} within {seconds:.3g} s."))


def garbage(provider: str, what: str) -> ProviderFailed:
    """The error for an answer that is not in its form."""
    return ProviderFailed(f"The provider {provider!r} sent {what}.")


def of_event(provider: str, error: Mapping[str, Any]) -> EngineError:
    """The error for an error that came as an event of a stream."""
    said = shortened(str(error.get("message") or "The provider gave an error."), MOST_SAID)
    code, kind = error.get("code"), f"{error.get('type')} {error.get('code')}"
    code = code if isinstance(code, int) else None
    if code == 429 or "rate_limit" in kind:
        return ProviderBusy(
            f"The provider {provider!r} takes no more requests for now.",
            retry_after_s=USUAL_RETRY_S,
        )
    if code in OF_THE_REQUEST or "invalid_request" in kind:
        return InvalidRequest(
            f"{said} (of {provider!r})", param=_text(error.get("param")), status=code or 400
        )
    if code in OF_THE_KEY or "authentication" in kind or "permission" in kind:
        return ProviderFailed(f"The provider {provider!r} refused the key of the server.")
    return ProviderFailed(f"The provider {provider!r} failed: {said}")


def _root(error: BaseException) -> BaseException | None:
    """The first cause of an error that says more than httpx does."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError | PrivateAddress):
        cause = cause.__cause__ or cause.__context__
    return cause


def _said(body: bytes) -> tuple[str, str | None, str | None]:
    """Message, field and code of an error's document, whatever of them there is."""
    try:
        document = json.loads(body)
    except ValueError:
        return "", None, None  # a page of a proxy, for example
    if isinstance(document, list) and document:  # Gemini's
        document = document[0]
    if not isinstance(document, dict):
        return "", None, None
    error = document.get("error", document)
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return "", None, None
    said = error.get("message") or error.get("detail") or document.get("detail") or ""
    text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return shortened(text, MOST_SAID), _text(error.get("param")), _text(error.get("code"))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
