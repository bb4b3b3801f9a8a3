"""Find the records below a folder. A damaged one is named with its reason, and the others are read all the same."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clbench.errors import ClbenchError, InputError
from clbench.store.record import RECORDED, RunRecord
from clbench.store.schema import Spec

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FoundRun", "find_runs", "load_runs"]

MARKS = {"DONE", *RECORDED}


@dataclass(frozen=True)
class FoundRun:
    """A run on disk. reason: what is wrong with a damaged one. spec: None if unreadable. summary: empty if none."""

    path: Path
    state: Literal["done", "unfinished", "damaged"]
    reason: str = ""
    spec: Spec | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        """One flat row: the spec's plain fields, `hp.<name>`, `scenario.<name>` for its parameters, then the summary,
        with `times.<part>` and `memory_bytes.<name>`."""
        row: dict[str, Any] = {"path": str(self.path), "state": self.state, "reason": self.reason}
        if self.spec is not None:
            content = self.spec.decisive()
            row |= {key: value for key, value in content.items() if not isinstance(value, dict | list)}
            row |= {f"scenario.{key}": value for key, value in content["scenario_params"].items()}
            row |= {f"hp.{key}": value for key, value in content["hyperparameters"].items()}
        for key, value in self.summary.items():
            row |= {f"{key}.{part}": item for part, item in value.items()} if isinstance(value, dict) else {key: value}
        return row


def find_runs(folder: Path) -> list[FoundRun]:
    """All runs in `folder` and below, by path. Sizes of finished runs' files are checked, contents are not
    (`RunRecord.damage` does that). Imports neither torch nor pandas. Raises InputError if there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give the one that runs were written to (--out of clbench run)")
    found = []
    for path, below, files in os.walk(folder):
        below.sort()
        if MARKS & set(files):
            below.clear()
            found.append(_look(Path(path)))
    return found


def load_runs(folder: Path) -> "pd.DataFrame":
    """`find_runs` as a table: one row per run, columns as in `FoundRun.as_row`, unfinished and damaged ones included
    (`runs[runs.state == "done"]` leaves them out). Raises InputError if there is no such folder."""
    import pandas as pd

    rows = [run.as_row() for run in find_runs(folder)]
    return pd.DataFrame(rows, columns=None if rows else ["path", "state", "reason"])


def _look(path: Path) -> FoundRun:
    record = RunRecord(path)
    spec, summary = None, {}
    try:
        spec = record.read_spec()
        if not record.is_done():
            return FoundRun(path, "unfinished", spec=spec)
        summary = record.read_summary()
        damage = record.damage(deep=False)
    except ClbenchError as error:
        return FoundRun(path, "damaged", str(error), spec, summary)
    return FoundRun(path, "damaged" if damage else "done", "; ".join(damage), spec, summary)
