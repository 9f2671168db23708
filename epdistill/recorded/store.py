"""Records: what a run, an evaluation, an ablation or a benchmark found, in one file each.

A record is the JSON that was written where it was measured, less this machine's paths, with
the digest of that file. It is sealed again (`epdistill.sealed`), so a record that was edited is
refused, and whatever is made from records rests on figures that were measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdistill.errors import EvaluationError
from epdistill.runs import atomic_write
from epdistill.sealed import KEY, read_sealed, seal

FORMAT = 1
RUN, EVALUATION, ABLATION, BENCH = "run", "evaluation", "ablation", "bench"
KINDS = (RUN, EVALUATION, ABLATION, BENCH)
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")


@dataclass(frozen=True)
class Record:
    """One file.

    Attributes:
        kind: `"run"`, `"evaluation"`, `"ablation"` or `"bench"`.
        name: Of the folder that it is about; an ablation's is made of its data, recipe, split and
            first seed.
        command: What to type to measure it again.
        hardware: Processor, cores, versions; None where the source does not say.
        content: The JSON of the source.
    """

    kind: str
    name: str
    command: str
    hardware: Mapping[str, Any] | None
    content: Mapping[str, Any]

    @property
    def stem(self) -> str:
        """What the names of its file and of its pictures begin with."""
        return f"{self.kind}-{_UNSAFE.sub('-', self.name).strip('-')}"

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.stem}.json"


def without_paths(content: Any) -> Any:
    """The same JSON with every absolute path cut to its last part."""
    if isinstance(content, Mapping):
        return {key: without_paths(value) for key, value in content.items() if key != KEY}
    if isinstance(content, list | tuple):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and Path(content).is_absolute():
        return Path(content).name
    return content


def write_record(record: Record, folder: Path, source: str) -> Path:
    """Write a record; an older one of the same name is replaced.

    Args:
        record: What was measured.
        folder: Made if missing.
        source: SHA-256 of the file that it is taken from.

    Returns:
        Its path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file
    content = {
        "format": FORMAT,
        "kind": record.kind,
        "name": record.name,
        "command": record.command,
        "hardware": None if record.hardware is None else dict(record.hardware),
        "source_sha256": source,
        "content": without_paths(record.content),
    }
    atomic_write(path, seal(content))
    return path


def read_records(folder: Path) -> list[Record]:
    """Every record of a folder, by file name.

    Raises:
        EvaluationError: There is none, or one is damaged, edited, or of another format.
    """
    found = list(_read(folder))
    if not found:
        raise EvaluationError(
            f"{folder} holds no records; expected some: name the folders of runs, evaluations, "
            "ablations or benchmarks"
        )
    return found


def _read(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.glob("*.json")):
        try:
            content = read_sealed(path)
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"the record {path} cannot be read ({error}); record it again, or delete it"
            ) from error
        if content.get("format") != FORMAT or content.get("kind") not in KINDS:
            raise EvaluationError(
                f"{path} is no record of format {FORMAT}; expected none but these in its folder"
            )
        yield Record(*(content[key] for key in ("kind", "name", "command", "hardware", "content")))


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """Those of one kind."""
    return [record for record in records if record.kind == kind]
