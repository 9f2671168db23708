"""Sealed JSON: every byte counts, files without a seal are still read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from epdistill.sealed import KEY, read_sealed, seal, sealed, unseal

CONTENT = {"kind": "teacher", "results": {"accuracy": 0.5, "n": [1, 2]}, "text": "é\n", "no": None}


def test_what_is_sealed_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(seal(CONTENT))
    assert read_sealed(path) == CONTENT
    # Any JSON reader sees the same, and where it was sealed.
    plain = json.loads(path.read_text())
    assert list(plain) == [*CONTENT, KEY]
    del plain[KEY]
    assert plain == CONTENT


def test_every_bit_of_every_byte_counts() -> None:
    data = seal(CONTENT).encode()
    assert sealed(data)
    for position in range(len(data)):
        for bit in range(8):
            bad = bytearray(data)
            bad[position] ^= 1 << bit
            with pytest.raises(ValueError):
                unseal(bytes(bad))


def test_cut_and_stretched_files_are_noticed() -> None:
    data = seal(CONTENT).encode()
    for end in range(len(data)):
        with pytest.raises(ValueError):
            unseal(data[:end])
    for bad in (data + b"\n", data + b" ", b" " + data, data.replace(b"\n", b"\r\n")):
        with pytest.raises(ValueError, match=r"damaged,? or was edited"):
            unseal(bad)


@pytest.mark.parametrize("indent", [None, 2])
def test_files_without_a_seal_are_read_as_they_are(indent: int | None) -> None:
    data = json.dumps(CONTENT, indent=indent).encode()
    assert not sealed(data)
    assert unseal(data) == CONTENT
    for other in (b"[]", b"3", b"", b"{"):
        with pytest.raises(ValueError):
            unseal(other)


def test_what_cannot_be_sealed() -> None:
    for content in ({}, {KEY: "1"}):
        with pytest.raises(ValueError, match="expected entries"):
            seal(content)
    with pytest.raises(ValueError):
        seal({"accuracy": float("nan")})
