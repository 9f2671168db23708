"""The published CIFAR-10-C arrays (Hendrycks and Dietterich, Zenodo record 2535967).

A family of its own, `cifar10c`: its numbers are comparable with the literature, and
never stand in one table with those of `cifar10c-style`.

The record holds one file, CIFAR-10-C.tar (2,918,471,680 bytes): for each of the 19
types an array (50000,32,32,3) uint8, the 10,000 test images of CIFAR-10 at severity
1, then at 2, and so on, and `labels.npy` (50000,) uint8. Give the tar or the folder
it was unpacked into; both are read in place, memory-mapped, and nothing is unpickled.

    arrays = open_cifar10c(Path("CIFAR-10-C"))
    images, labels = arrays.load("fog", 3, torch.arange(1000))
    arrays.describe()   # goes into the results
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from epdistill.errors import EvaluationError
from epdistill.robustness.corruptions.registry import EXTRA, MAIN, SEVERITIES

OFFICIAL_FAMILY = "cifar10c"
SOURCE = "https://zenodo.org/records/2535967"
# As the record lists them.
TAR_BYTES = 2_918_471_680
TAR_MD5 = "56bf5dcef84df0e2308c6dcbcbbd8499"

PER_SEVERITY = 10_000
IMAGES = PER_SEVERITY * len(SEVERITIES)
ARRAY_SHAPE = (IMAGES, 32, 32, 3)
LABELS = "labels"
CLASSES = 10

_REMEDY = f"unpack CIFAR-10-C.tar of {SOURCE} again, or give the tar itself"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Member:
    """Where an .npy file lies: `size` bytes at `offset` of the file `path`."""

    path: Path
    offset: int
    size: int


@dataclass
class Cifar10C:
    """The published arrays, opened and checked; see `open_cifar10c`.

    Attributes:
        path: The folder or tar they come from.
        tar_md5: The tar's verified MD5, or None for a folder.
        names: The types that are there, in the order asked for.
        family: `"cifar10c"`.
    """

    path: Path
    tar_md5: str | None
    names: tuple[str, ...]
    _members: dict[str, _Member] = field(repr=False)
    _sha256: dict[str, str] = field(default_factory=dict, repr=False)
    family: str = OFFICIAL_FAMILY

    def load(self, name: str, severity: int, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Some of the test images under one corruption.

        The SHA-256 of the array's file is taken on the first use of its name.

        Args:
            name: One of `names`.
            severity: 1..5.
            examples: (N,) int64, their numbers among CIFAR-10's test images, 0..9999.

        Returns:
            images: (N,3,32,32) uint8, contiguous.
            labels: (N,) int64 in 0..9.

        Raises:
            EvaluationError: An unknown name, severity or example, or a file that is
                missing, truncated, of the wrong shape or type.
        """
        if name not in self.names:
            raise EvaluationError(
                f"received corruption {name!r}; expected one of {', '.join(self.names)}: the "
                f"arrays that {self.path} holds"
            )
        if severity not in SEVERITIES:
            raise EvaluationError(f"received severity {severity}; expected one of 1, 2, 3, 4, 5")
        numbers = examples.cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < PER_SEVERITY:
            raise EvaluationError(
                f"received examples {numbers.min()}..{numbers.max()}; expected the numbers of "
                f"CIFAR-10's test images, 0..{PER_SEVERITY - 1}"
            )
        for used in (name, LABELS):
            if used not in self._sha256:
                self._sha256[used] = _digest(self._members[used], "sha256")
        rows = numbers + (severity - 1) * PER_SEVERITY
        pixels = _array(self._members[name], ARRAY_SHAPE)[rows]
        labels = _array(self._members[LABELS], (IMAGES,))[rows]
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return images, torch.from_numpy(labels.astype(np.int64))

    def describe(self) -> dict[str, Any]:
        """What the results record: family, source, the tar's MD5, SHA-256 of the files used."""
        return {
            "family": self.family,
            "source": SOURCE,
            "tar_md5": self.tar_md5,
            "sha256": {f"{name}.npy": value for name, value in sorted(self._sha256.items())},
        }


def open_cifar10c(path: Path, names: tuple[str, ...] = (*MAIN, *EXTRA)) -> Cifar10C:
    """Open the published arrays and check what can be checked without reading them all.

    A tar is checked against the published size and MD5 (some seconds). The checksums of
    the single arrays are not published: from a folder, their headers, sizes and labels
    are checked, and the SHA-256 of those that are used is recorded.

    Args:
        path: The folder that holds the .npy files (or a folder `CIFAR-10-C` that does),
            or CIFAR-10-C.tar.
        names: The types that will be needed.

    Returns:
        The arrays; nothing but the labels has been read.

    Raises:
        EvaluationError: A file is missing, truncated, damaged, of the wrong shape or type.
    """
    if unknown := [name for name in names if name not in (*MAIN, *EXTRA)]:
        raise EvaluationError(
            f"received corruption {unknown[0]!r}; expected one of {', '.join((*MAIN, *EXTRA))}"
        )
    if path.is_dir():
        tar_md5, members = None, _folder_members(path)
    elif path.is_file():
        tar_md5, members = _verify_tar(path), _tar_members(path)
    else:
        raise EvaluationError(
            f"{path} does not exist; expected CIFAR-10-C.tar of {SOURCE}, or the folder it was "
            "unpacked into"
        )
    if missing := [name for name in (*names, LABELS) if name not in members]:
        raise EvaluationError(
            f"{path} lacks {', '.join(f'{name}.npy' for name in missing)}; expected the arrays of "
            f"CIFAR-10-C: {_REMEDY}"
        )
    for name in names:
        _array(members[name], ARRAY_SHAPE)
    _check_labels(_array(members[LABELS], (IMAGES,)), members[LABELS].path)
    return Cifar10C(path, tar_md5, tuple(names), members)


def _folder_members(folder: Path) -> dict[str, _Member]:
    inner = folder / "CIFAR-10-C"
    home = inner if inner.is_dir() and not (folder / f"{LABELS}.npy").exists() else folder
    return {
        file.stem: _Member(file, 0, file.stat().st_size)
        for file in sorted(home.glob("*.npy"))
        if file.is_file()
    }


def _tar_members(path: Path) -> dict[str, _Member]:
    """The .npy files of an uncompressed tar; their bytes stand in it as they are."""
    with tarfile.open(path, "r:") as tar:
        return {
            Path(entry.name).stem: _Member(path, entry.offset_data, entry.size)
            for entry in tar
            if entry.isreg() and entry.name.endswith(".npy")
        }


def _verify_tar(path: Path) -> str:
    size = path.stat().st_size
    if size != TAR_BYTES:
        raise EvaluationError(
            f"{path} has {size} bytes; expected {TAR_BYTES}, CIFAR-10-C.tar of {SOURCE}: "
            "download it again"
        )
    found = _digest(_Member(path, 0, size), "md5")
    if found != TAR_MD5:
        raise EvaluationError(
            f"{path} has MD5 {found}; expected {TAR_MD5}, CIFAR-10-C.tar of {SOURCE}: "
            "download it again"
        )
    return found


def _digest(member: _Member, algorithm: str) -> str:
    # MD5 here tells a bad download from a good one; it guards against nobody.
    digest = hashlib.new(algorithm, usedforsecurity=False)
    left = member.size
    with member.path.open("rb") as file:
        file.seek(member.offset)
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _array(member: _Member, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    """Map an .npy file after checking its header and its length.

    Raises:
        EvaluationError: Not an .npy file, another shape or type, or truncated.
    """
    what = member.path if member.offset == 0 else f"{member.path} (at byte {member.offset})"
    try:
        with member.path.open("rb") as file:
            file.seek(member.offset)
            found, fortran, dtype = _header(file)
            start = file.tell()
    except (OSError, ValueError, EOFError) as error:
        raise EvaluationError(
            f"{what} is not a readable .npy file ({error}); expected an array {shape} of uint8: "
            f"{_REMEDY}"
        ) from error
    if found != shape or dtype != np.uint8 or fortran:
        order = ", column-major" if fortran else ""
        raise EvaluationError(
            f"{what} holds an array {found} of {dtype}{order}; expected {shape} of uint8: {_REMEDY}"
        )
    expected = int(np.prod(shape)) + start - member.offset
    if member.size != expected:
        raise EvaluationError(
            f"{what} has {member.size} bytes; expected {expected}: it is truncated or damaged, "
            f"{_REMEDY}"
        )
    return np.memmap(member.path, dtype=np.uint8, mode="r", offset=start, shape=shape)


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether column-major, and type from an .npy header."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _check_labels(labels: np.ndarray, path: Path) -> None:
    """The same 10,000 labels in 0..9 five times over."""
    if int(labels.max()) >= CLASSES:
        raise EvaluationError(
            f"{path} holds label {int(labels.max())}; expected 0..{CLASSES - 1}: {_REMEDY}"
        )
    by_severity = labels.reshape(len(SEVERITIES), PER_SEVERITY)
    if not (by_severity == by_severity[0]).all():
        raise EvaluationError(
            f"{path} differs between severities; expected the same {PER_SEVERITY} labels five "
            f"times: {_REMEDY}"
        )
