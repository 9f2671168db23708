"""`epdistill results`: what was measured is recorded, and the page of it written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdistill.recorded.gather import record_all
from epdistill.recorded.page import write_page
from epdistill.recorded.store import read_records


@dataclass(frozen=True)
class Kept:
    """What `keep` did.

    Attributes:
        page: The Markdown file.
        recorded: Records that were written now.
        records: How many there are.
        pictures: Stems of the pictures beside the records.
    """

    page: Path
    recorded: tuple[Path, ...]
    records: int
    pictures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Keys `page`, `recorded`, `records`, `pictures`."""
        return {
            "page": str(self.page),
            "recorded": [str(path) for path in self.recorded],
            "records": self.records,
            "pictures": list(self.pictures),
        }


def keep(folders: Sequence[Path], records: Path, page: Path) -> Kept:
    """Record what lies in some folders, and write the page of all records.

    Args:
        folders: Of runs, evaluations, ablations and benchmarks; may be empty.
        records: The folder of the records.
        page: The Markdown file.

    Raises:
        EvaluationError: A folder holds nothing to record, there are no records, or one is damaged.
    """
    recorded = record_all(folders, records)
    found = read_records(records)
    pictures = write_page(found, records, page)
    return Kept(page, tuple(recorded), len(found), tuple(pictures))
