"""JSON files that know when they were changed: the last entry is the digest of all before it.

    {
      ...,
      "self_sha256": "SHA-256 of every byte before the comma of this line"
    }

Every byte of such a file is covered: those before by the digest, those of the last lines
because they can only be one thing. A file without that entry is from before there was
one, and is read as it is; so whoever edits a file by hand takes the entry out.

Files of bytes carry their digest in front (`with_digest`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "self_sha256"
_HEX = 64
_DIGEST = hashlib.sha256().digest_size


def _tail(body: bytes) -> bytes:
    return f',\n  "{KEY}": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


_LENGTH = len(_tail(b""))
_FIXED = _LENGTH - _HEX


def seal(content: Mapping[str, Any]) -> str:
    """The text of a JSON file, readable by people.

    Args:
        content: JSON values, at least one; `self_sha256` must not be among the keys.
    """
    if not content or KEY in content:
        raise ValueError(f"expected entries, and none of them {KEY}")
    body = json.dumps(content, indent=2, allow_nan=False).removesuffix("\n}").encode()
    return (body + _tail(body)).decode()


def sealed(data: bytes) -> bool:
    """Whether a file was written by `seal`, perhaps damaged since.

    A flipped byte in the entry's own name must not make a sealed file look like one from
    before there were seals, so it is enough that half of the last lines look like it.
    """
    tail, model = data[-_LENGTH:], _tail(b"")
    head, foot = slice(0, _FIXED - 4), slice(-4, None)
    same = sum(
        a == b for part in (head, foot) for a, b in zip(tail[part], model[part], strict=False)
    )
    return len(tail) == _LENGTH and 2 * same >= _FIXED


def unseal(data: bytes) -> dict[str, Any]:
    """The content of a JSON file, checked if it is sealed.

    Raises:
        ValueError: It is damaged or was edited, or holds no JSON object.
    """
    is_sealed = sealed(data)
    if is_sealed and data[-_LENGTH:] != _tail(data[:-_LENGTH]):
        raise ValueError(
            f"its {KEY} does not fit: it is damaged, or was edited, which takes removing that entry"
        )
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    if not is_sealed and KEY in content:
        raise ValueError(f"its {KEY} is not where it was written: it is damaged or was edited")
    content.pop(KEY, None)
    return content


def read_sealed(path: Path) -> dict[str, Any]:
    """As `unseal`, from a file.

    Raises:
        OSError: It cannot be read.
        ValueError: As `unseal` says.
    """
    return unseal(path.read_bytes())


def with_digest(data: bytes) -> bytes:
    """The SHA-256 of some bytes (32 bytes), and then themselves."""
    return hashlib.sha256(data).digest() + data


def without_digest(content: bytes) -> bytes | None:
    """What `with_digest` was given; None if it was torn or altered since."""
    data = content[_DIGEST:]
    return data if with_digest(data) == content else None
