"""What the programs know of the server: its address, a model, and what bounds random answers."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, Field

URL = os.environ["ROUNDHOUSE_URL"]
MODEL = "tiny-qwen"
EMBED = "text-embedding-3-small"
HELLO = [{"role": "user", "content": "Hello"}]
QUOTE = {"4": 6}
"""`logit_bias` for the token of the quotation mark: random weights soon end a string."""


class Person(BaseModel):
    """A person in a story"""

    name: str = Field(pattern="^[a-z]{1,10}$")
    age: int = Field(ge=0, le=150)
    mood: Literal["good", "bad"]
