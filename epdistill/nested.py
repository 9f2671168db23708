"""Nested mappings, flat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """What is not a mapping itself, with its dotted key.

    Args:
        content: With strings as keys.
        above: Put in front of every key.
    """
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
