"""JSON files that say when they have been changed: a sha256 over everything else in them.

It shows a change by accident or by hand. It is no secret key: who rewrites the file on purpose can sign it anew, and
`clbench protocol show --records` compares it with the run records.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clbench.atomic import atomic_write_bytes, explain_os_error
from clbench.errors import InputError

__all__ = ["read_signed", "signature", "write_signed"]


def signature(content: Mapping[str, Any]) -> str:
    """sha256 of the content without its signature, in one canonical form."""
    plain = {key: value for key, value in content.items() if key != "signature"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_signed(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write the content with its signature, whole or not at all; returns what was written."""
    signed = {**content, "signature": signature(content)}
    atomic_write_bytes(path, (json.dumps(signed, indent=1, allow_nan=False) + "\n").encode())
    return signed


def read_signed(path: Path, kind: str) -> dict[str, Any]:
    """Read a file of a kind back. Raises InputError if it is missing, damaged, of another kind, or has been changed."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; give the {kind}.json that `clbench protocol run` wrote") from None
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise InputError(f"{path} is no {kind} file of clbench")
    if content.get("signature") != signature(content):
        raise InputError(
            f"{path} has been changed since it was written: its signature does not fit; run the study again"
        )
    return content
