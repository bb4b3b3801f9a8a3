"""Checkpoints: the newest two states of a run, each whole and provably so.

A file is called `<number>-<sha256>.pt`: its name says which bytes belong in it, so that one rename puts both in place,
and it opens with plain `torch.load(weights_only=True)`.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clbench.atomic import atomic_path, sync_folder
from clbench.errors import InputError, RunFailed

__all__ = ["Checkpoints", "Loaded", "file_sha256"]

KEPT = 2
NAME = re.compile(r"(\d{6})-([0-9a-f]{16})\.pt")


class Loaded(NamedTuple):
    """A state read back, and what a record should say about that: which one, and which newer ones were damaged."""

    state: dict[str, Any]
    notes: tuple[str, ...]


@dataclass
class Checkpoints:
    """The checkpoints in `folder`."""

    folder: Path
    _proved: bool = field(default=False, repr=False)

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write a state of tensors and plain values; older states stay until it is in place, one of them for good.

        Raises RunFailed if the disk is full or the state holds what a checkpoint cannot, InputError if the folder
        cannot be written.
        """
        import torch

        new = self.folder / "new.pt"
        with atomic_path(new) as temporary, temporary.open("wb") as file, _os_errors():
            torch.save(dict(state), file)
        if not self._proved:  # once per process: better to fail now than on the day it is needed
            self._prove(new)
        present = self._present()
        number = int(present[0].name[:6]) + 1 if present else 1
        path = self.folder / f"{number:06d}-{file_sha256(new)[:16]}.pt"
        os.replace(new, path)
        sync_folder(self.folder)
        for old in [*present[KEPT - 1 :], *self.folder.glob("*.damaged")]:
            old.unlink(missing_ok=True)
        return path

    def load(self, map_location: Any = "cpu") -> Loaded | None:
        """The newest state that is intact; None if there is none at all. Damaged ones are set aside as `.damaged`.

        Raises InputError if there are checkpoints but all are damaged.
        """
        import torch

        damaged: list[Path] = []
        notes: list[str] = []
        for path in self._present():
            reason = _damage(path)
            if reason is None:
                state = torch.load(path, map_location=map_location, weights_only=True)
                for bad in damaged:
                    os.replace(bad, bad.with_suffix(".damaged"))
                return Loaded(state, (*notes, f"went on from checkpoint {path.name}"))
            notes.append(f"checkpoint {path.name} is damaged ({reason}) and was set aside")
            damaged.append(path)
        if damaged:
            raise InputError(
                f"no checkpoint in {self.folder} is intact; delete that folder to start this run from the beginning, "
                f"or use --fresh to start anew beside it"
            )
        return None

    def remove(self) -> None:
        """Delete the folder and what it holds of ours."""
        for path in self.folder.glob("*"):
            if NAME.fullmatch(path.name) or path.suffix == ".damaged" or path.name == "new.pt":
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # someone else's file in it
            self.folder.rmdir()

    def _present(self) -> list[Path]:
        """Newest first."""
        return sorted((path for path in self.folder.glob("*.pt") if NAME.fullmatch(path.name)), reverse=True)

    def _prove(self, path: Path) -> None:
        import torch

        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever the safe loader refuses
            path.unlink(missing_ok=True)
            reason = str(error).strip().splitlines()[0]
            raise RunFailed(
                f"the run's state cannot be saved safely: {reason}; state_dict may hold tensors and plain values only"
            ) from error
        self._proved = True


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
    expected = path.stem[7:]
    try:
        found = file_sha256(path)
    except OSError as error:
        return error.strerror or str(error)
    return None if found.startswith(expected) else f"its sha256 starts {found[:16]} instead of {expected}"


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """torch's writer hides the error of the file below it, a full disk for one: bring that back."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise cause from None
