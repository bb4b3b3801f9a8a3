"""What clbench raises on purpose: one clear sentence that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable

__all__ = ["ClbenchError", "InputError", "RunFailed", "unknown_name"]


class ClbenchError(Exception):
    """Base of all errors shown to a user without a traceback; `exit_code` is the process's."""

    exit_code = 1


class InputError(ClbenchError):
    """The command, a file or a value given by the user cannot be used (exit code 2)."""

    exit_code = 2


class RunFailed(ClbenchError):
    """A run that had started could not go on; its record says where (exit code 1)."""

    exit_code = 1


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> InputError:
    """Build the error for a name that is in no registry, with the nearest valid names.

    >>> print(unknown_name("method", "slcaa", ["slca", "er"]))
    unknown method 'slcaa'; did you mean 'slca'?
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        advice = "did you mean " + " or ".join(repr(n) for n in near) + "?"
    else:
        advice = "known: " + ", ".join(names)
    return InputError(f"unknown {kind} {name!r}; {advice}" + (f" {hint}" if hint else ""))
