"""Checking answers against OpenAI's published contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

_DOCUMENT = json.loads((Path(__file__).parent / "openai.json").read_text(encoding="utf-8"))


def conforms(document: Any, schema: str) -> bool:
    """Whether a JSON document is what the schema says; what is wrong is raised.

    Raises:
        ValidationError: naming the property.

    """
    reference = {"$ref": f"#/components/schemas/{schema}"}
    Draft202012Validator({**_DOCUMENT, **reference}).validate(document)
    return True
