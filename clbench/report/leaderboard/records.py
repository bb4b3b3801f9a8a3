"""What lies in the folders: every run, what state it is in, and which ones are no results.

A record here is a run's own folder, or a committed one that holds `spec.json` and `summary.json` (and perhaps
`env.json`, `curve.parquet`, `matrix.csv`, `predictions.parquet`) without the rest.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from clbench.errors import ClbenchError, InputError
from clbench.store import RunRecord, find_runs
from clbench.store.scan import FoundRun
from clbench.store.schema import Environment, Spec

__all__ = ["LeftOut", "Run", "gather", "hide_folders", "last_environment"]


@dataclass(frozen=True)
class Run:
    """One record. name: its path as a page shows it, without the folders of this machine. root: number of the folder
    it came from. summary: empty unless it is done."""

    name: str
    path: Path
    root: int
    state: Literal["done", "unfinished", "damaged"]
    reason: str = ""
    spec: Spec | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> RunRecord:
        return RunRecord(self.path)

    @property
    def known(self) -> Spec:
        """Its spec, where that was read."""
        if self.spec is None:
            raise ValueError(f"{self.name} has no spec")
        return self.spec


@dataclass(frozen=True)
class LeftOut:
    """A record that is in no table, or not counted there, and why."""

    name: str
    why: str


def gather(folders: Sequence[Path]) -> tuple[list[Run], list[LeftOut]]:
    """All records below the folders, in their order, and those that are no results of their own.

    Damaged ones are among the runs if at least their spec can be read (their row shows them), and left out otherwise.
    Trials of a study are left out: they were scored to choose a value, not to report one.
    Raises InputError for a folder that is not there, or if there is no record in any of them.
    """
    runs: list[Run] = []
    out: list[LeftOut] = []
    seen: dict[Path, None] = {}
    trials = 0
    for number, folder in enumerate(folders):
        for found in find_runs(folder):
            if found.path.resolve() in seen:  # the same folder given twice, or one inside another
                continue
            seen[found.path.resolve()] = None
            if _is_trial(found.path):
                trials += 1
                continue
            run = _as_run(found, folder, number)
            if run.spec is None:
                out.append(LeftOut(run.name, run.reason))
            else:
                runs.append(run)
    if trials:
        out.append(LeftOut(f"{trials} trials of studies", "scored to choose hyperparameters, so no results"))
    if not runs and not out:
        where = ", ".join(str(folder) for folder in folders)
        raise InputError(f"there is no run record below {where}; give the folder that `clbench run --out` wrote to")
    return runs, out


def _as_run(found: FoundRun, folder: Path, number: int) -> Run:
    name = shown_name(found.path, folder)
    reason = hide_folders(found.reason.replace(str(found.path), name))
    run = Run(name, found.path, number, found.state, reason, found.spec, found.summary)
    if run.state == "unfinished" and (found.path / "summary.json").exists():
        if (found.path / ".lock").exists() or (found.path / "checkpoint").exists():
            return run  # being run, or killed before its last file
        try:
            return replace(run, state="done", summary=run.record.read_summary())
        except ClbenchError as error:
            return replace(run, state="damaged", reason=hide_folders(str(error).replace(str(found.path), name)))
    return run


@cache
def _is_study(folder: Path) -> bool:
    return (folder / "study.json").exists()


def _is_trial(path: Path) -> bool:
    return any(parent.name == "trials" and _is_study(parent.parent) for parent in path.parents)


def shown_name(path: Path, folder: Path) -> str:
    """`path` below the folder as it was given; of an absolute one only the last part."""
    base = folder.resolve().name if folder.is_absolute() or ".." in folder.parts else folder.as_posix()
    inside = path.relative_to(folder).as_posix()
    return inside if base in (".", "") else base if inside == "." else f"{base}/{inside}"


ABSOLUTE = re.compile(r"(?<![\w.\-/…])(?:~|/[\w.@+\-]+)(?:/[\w.@+\-]+)*/(?=[\w.@+\-])")


def hide_folders(text: str) -> str:
    """Absolute paths without the folders of the machine they were on: `--data /home/me/data` -> `--data …/data`.

    >>> hide_folders("--weights=/home/me/w/net.safetensors --set lr=1/2")
    '--weights=…/net.safetensors --set lr=1/2'
    """
    return ABSOLUTE.sub("…/", text)


def last_environment(run: Run) -> tuple[list[Environment], str]:
    """The entries of env.json (one per start; empty where there is none), and what is wrong with the file."""
    try:
        return run.record.read_env(), ""
    except ClbenchError as error:
        return [], hide_folders(str(error).replace(str(run.path), run.name))


def done(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.state == "done"]
