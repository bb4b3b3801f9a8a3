"""Load a Python file given by path: a user's own scenario (or method)."""

import hashlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from clbench.errors import InputError

__all__ = ["error_in_file", "load_module"]


def load_module(path: str | Path, kind: str) -> ModuleType:
    """Run the file as a module whose name depends on its place and content, so that it can never shadow another.

    Raises InputError, one sentence with file and line, if it is missing or fails while it is imported. Nothing is
    written beside it. kind: what it is, for the message ("scenario").
    """
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the {kind} file {path}: {error.strerror}") from None
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + text).hexdigest()[:16]
    module = ModuleType(f"clbench_{kind}_file_{digest}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and type hints look their module up by name
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise error_in_file(path, error, f"while the {kind} file was imported") from error
    return module


def error_in_file(path: str | Path, error: BaseException, when: str) -> InputError:
    """Say in one sentence which line of the file `error` came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
        reason = error.msg
    else:
        line = lines[-1] if lines else None
        reason = str(error).split("\n")[0]
    place = f"{path}:{line}" if line else str(path)
    return InputError(f"{place}: {type(error).__name__}{': ' + reason if reason else ''} ({when})")
