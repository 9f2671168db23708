"""The playground's files, sent as they are: no build step, nothing from elsewhere.

The samples: digits 0, 3, 6 and 9 are from the UCI set of handwritten digits
(E. Alpaydin, C. Kaynak, 1998, CC BY 4.0) as bundled with scikit-learn; the ship, the car
and the aeroplane were drawn for this page.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import PurePosixPath

from fastapi.responses import Response

from epdistill.errors import RequestError

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
}
_SAMPLES = "samples"
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def samples() -> list[str]:
    """Names of the bundled pictures, as `file` takes them."""
    return [name for name in _files() if name.startswith(f"{_SAMPLES}/")]


def file(name: str) -> Response:
    """One of the page's files.

    Raises:
        RequestError: 404; there is no such file.
    """
    content = _files().get(name)
    if content is None:
        raise RequestError(404, f"there is no {name[:80]!r} here; expected the playground at /")
    media = _TYPES[PurePosixPath(name).suffix]
    return Response(content, headers={**_HEADERS, "content-type": media})


@cache
def _files() -> dict[str, bytes]:
    """Everything that may be sent, read once: a name from outside never reaches a file system."""
    root = resources.files(__name__)
    found = {}
    for folder, prefix in ((root, ""), (root / _SAMPLES, f"{_SAMPLES}/")):
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if PurePosixPath(entry.name).suffix in _TYPES:
                found[prefix + entry.name] = entry.read_bytes()
    return found
