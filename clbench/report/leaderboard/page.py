"""The page: one HTML file with everything in it. It loads nothing, and a policy in its head forbids that it ever does.

All text that comes from records reaches the document through `textContent`; the data stands in a JSON block in which no
`<` is left, and only the two scripts written here may run, by their hash.
"""

import base64
import hashlib
import json
from pathlib import Path

from clbench.report.leaderboard.payload import Payload

__all__ = ["build_page"]

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("core.js", "charts.js", "curves.js", "board.js", "main.js")


def build_page(payload: Payload) -> str:
    """The whole HTML document."""
    library = _asset("vendor/uPlot.iife.min.js")
    own = "\n".join(_asset(name) for name in SCRIPTS)
    parts = {
        "POLICY": _policy(library, own),
        "STYLE": _asset("vendor/uPlot.min.css") + "\n" + _asset("style.css"),
        "DATA": _json(payload.content),
        "BLOBS": "\n".join(
            f'<script type="text/plain" id="{name}">{blob}</script>' for name, blob in payload.blobs.items()
        ),
        "LIBRARY": library,
        "SCRIPT": own,
    }
    pieces = _asset("page.html").split("@@")  # text, NAME, text, NAME, ... : no part is looked at for names again
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _policy(*scripts: str) -> str:
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def _json(content: object) -> str:
    """JSON that can stand inside a script element: ASCII, and no character that HTML gives a meaning."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
