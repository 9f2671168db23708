"""The whole file: style and script inside, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources


def document(title: str, sections: Sequence[tuple[str, str, str]], foot: str) -> str:
    """The page's text.

    Args:
        title: Of the page.
        sections: Anchor, name and HTML of each; empty ones are left out.
        foot: HTML at the end.
    """
    files = resources.files("epdistill.page")
    style = files.joinpath("report.css").read_text()
    script = files.joinpath("report.js").read_text()
    shown = [(anchor, name, text) for anchor, name, text in sections if text]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in shown)
    body = "".join(text for _, _, text in shown)
    # Only this very style and script run; images are inside; nothing is fetched or sent.
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><meta name="generator" content="epdistill">'
        # An empty icon, so that no browser looks for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style>'
        f"</head><body><header><h1>{escape(title)}</h1><nav>{links}</nav></header>"
        f"<main>{body}</main><footer>{foot}</footer><script>{script}</script></body></html>\n"
    )


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
