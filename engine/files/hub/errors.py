"""What the hub client's errors mean, in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine.errors import LoadFailed, NotFound, reason
from engine.files.hub.client import endpoint

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


@contextmanager
def plain_errors(repo: str) -> Iterator[None]:
    """Raise the client's errors as ours, which say what happened and what to do."""
    import httpx2
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise LoadFailed(_gated(repo)) from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no such revision") from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no repository {repo} at {endpoint()}, or it is private: check the name,"
            " or set HF_TOKEN to a token that may read it"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise LoadFailed(
                f"the hub refuses {repo} ({status}): the token in HF_TOKEN, or that of"
                " `hf auth login`, is not valid or may not read it"
            ) from error
        raise LoadFailed(f"the hub failed to give {repo}: {reason(error)}") from error
    except HFValidationError as error:
        raise NotFound(f"{repo!r} is not the name of a repository (owner/name)") from error
    except OfflineModeIsEnabled as error:
        raise LoadFailed(f"{repo} cannot be fetched: HF_HUB_OFFLINE is set") from error
    except (httpx2.HTTPError, LocalEntryNotFoundError, FileMetadataError) as error:
        raise LoadFailed(f"{repo} cannot be fetched from {endpoint()}: {reason(error)}") from error


def is_passing(error: HfHubHTTPError) -> bool:
    """Whether the hub may answer the next time."""
    return error.response.status_code in (408, 429) or error.response.status_code >= 500


def _gated(repo: str) -> str:
    from huggingface_hub import get_token

    accept = f"accept its conditions at {endpoint()}/{repo}"
    if get_token() is None:
        return (
            f"{repo} is gated: {accept}, then set HF_TOKEN to a token of that account"
            " (or run `hf auth login`)"
        )
    return f"{repo} is gated and your token may not read it: {accept} with its account"
