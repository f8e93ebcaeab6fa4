"""How the hub client of this process asks: the hub's address and the operator's token.

Importing this module does not import the client, which takes a third of a second.
"""

from __future__ import annotations


def endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, otherwise huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def headers() -> dict[str, str]:
    """The headers of a request, with the operator's token if there is one."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"authorization": f"Bearer {token}"} if token else {}
