"""Adding a model to a configuration file, whose every other byte stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError
from engine.files.atomic import new_file

MODELS = "models"


def with_model(text: str, entry: Mapping[str, Any]) -> str:
    """The text of a configuration with one more entry at the end of `models`.

    Raises:
        ConfigError: it is not YAML, or its models are not a list written one under the other.

    """
    try:
        root = yaml.compose(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from error
    if root is None:
        return _joined(text, f"{MODELS}:\n{_item(entry, 2)}")
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise ConfigError("expected a mapping at the top, written in lines")
    models = next((pair for pair in root.value if pair[0].value == MODELS), None)
    if models is None:
        return _joined(text, f"\n{MODELS}:\n{_item(entry, 2)}")
    key, value = models
    if isinstance(value, yaml.ScalarNode) and not value.value:  # nothing after the colon
        return _inserted(text, key.end_mark.line + 1, _item(entry, 2))
    if not isinstance(value, yaml.SequenceNode) or value.flow_style:
        raise ConfigError(f"{MODELS}: write the list with a line for each, `- id: …`")
    indent = value.start_mark.column
    return _inserted(text, _last_line(value) + 1, "\n" + _item(entry, indent))


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; its permissions stay.

    Raises:
        OSError: it cannot be written.

    """
    # Resolved, so that a link stays a link.
    with new_file(path.resolve(), mode=0o600) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _item(entry: Mapping[str, Any], indent: int) -> str:
    dumped = yaml.safe_dump(dict(entry), sort_keys=False, allow_unicode=True, width=100)
    lines = dumped.splitlines()
    first, rest = " " * indent + "- ", " " * (indent + 2)
    return "".join(f"{rest if number else first}{line}\n" for number, line in enumerate(lines))


def _joined(text: str, more: str) -> str:
    return text + ("" if not text or text.endswith("\n") else "\n") + more


def _inserted(text: str, line: int, more: str) -> str:
    lines = text.splitlines(keepends=True)
    if line <= len(lines) and line > 0 and not lines[line - 1].endswith("\n"):
        lines[line - 1] += "\n"
    return "".join(lines[:line]) + more + "".join(lines[line:])


def _last_line(node: yaml.Node) -> int:
    """The line where a node's last value ends: a block's own end is after what follows it."""
    if isinstance(node, yaml.MappingNode) and node.value and not node.flow_style:
        return _last_line(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and node.value and not node.flow_style:
        return _last_line(node.value[-1])
    line: int = node.end_mark.line
    # A block scalar ends at the beginning of the line after it.
    after = node.end_mark.column == 0 and line > node.start_mark.line
    return line - 1 if after else line
