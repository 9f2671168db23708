"""What tests of documented keys share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


class Document:
    """The keys in the first columns of the tables of one part of a document."""

    def __init__(self, file: str, part: str) -> None:
        section = (DOCS / file).read_text().split(f"\n## {part}\n", 1)[1].split("\n## ", 1)[0]
        self.keys: set[str] = set()
        for key in re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE):
            head, brace, rest = key.partition("{")
            names = rest.rstrip("}").split(", ") if brace else [""]
            self.keys |= {head + name for name in names}

    def unknown(self, content: object) -> set[str]:
        """The keys of some JSON that are not documented."""
        wide = tuple(key.removesuffix("*") for key in self.keys if key.endswith("*"))
        return {key for key in paths(content) if not key.startswith(wide)} - self.keys

    def missing(self, content: object) -> set[str]:
        """The documented keys that some JSON does not have."""
        return {key for key in self.keys if not key.endswith("*")} - set(paths(content))


def paths(value: object, above: str = "") -> Iterator[str]:
    """Every key of some JSON, as documents write them."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield above + key
            yield from paths(inside, f"{above}{key}.")
    elif isinstance(value, list):
        for inside in value:
            yield from paths(inside, f"{above.removesuffix('.')}[].")


@pytest.fixture
def document() -> type[Document]:
    """Open a part of a document by file and heading."""
    return Document
