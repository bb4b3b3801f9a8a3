"""Turn run records into what is committed: a small record of each run in FOLDER/runs, and FOLDER/table.md.

python results/collect.py RUNS FOLDER [metric ...]

A small record holds spec.json, summary.json, matrix.csv, curve.parquet (thinned if it is large) and env.json without
the folders of the machine. `python results/leaderboard.py` makes the leaderboard of all of them.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from clbench.metrics import Curve, aggregate
from clbench.report.leaderboard.records import hide_folders
from clbench.store import RunRecord, find_runs

COLUMNS = ("final_accuracy", "average_incremental_accuracy", "forgetting", "min_accuracy", "stability_gap")
LARGEST = 32_000  # bytes of a committed curve
SHOWN = ("per_class", "tasks", "setting", "shape")  # scenario parameters that a table shows


def main(runs: Path, folder: Path, columns: tuple[str, ...]) -> None:
    rows: dict[tuple[str, ...], list[dict[str, float | None]]] = {}
    for found in find_runs(runs):
        if found.state != "done" or found.spec is None:
            raise SystemExit(f"{found.path} is {found.state}: {found.reason}")
        spec = found.spec
        kept = folder / "runs" / spec.scenario / spec.method / found.path.name
        keep(RunRecord(found.path), kept)
        # what the scenario does to its data, as far as it was changed from its preset
        given = [f"{key}={value}" for key, value in spec.scenario_params.items() if key in SHOWN and value is not None]
        scenario = ", ".join([spec.scenario, *given])
        chosen = ", ".join(f"{k}={v.value}" for k, v in spec.hyperparameters.items() if v.source == "--set")
        key = (scenario, spec.method, chosen or "defaults", spec.backbone)
        rows.setdefault(key, []).append(found.summary)
    lines: list[str] = []
    for id in dict.fromkeys(key[0].partition(",")[0] for key in sorted(rows)):
        lines += [
            f"### {id}",
            "",
            *table({key: rows[key] for key in sorted(rows) if key[0].split(",")[0] == id}, columns),
            "",
        ]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def keep(record: RunRecord, kept: Path) -> None:
    """Write the small record of a run to the folder `kept`."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("spec.json", "summary.json", "matrix.csv"):
        if (record.path / name).exists():
            shutil.copy(record.path / name, kept / name)
    entries = [entry.model_dump(mode="json") for entry in record.read_env()]
    for entry in entries:  # commands and notes name folders
        entry["command"] = [hide_folders(word) for word in entry["command"]]
        entry["notes"] = [hide_folders(note) for note in entry["notes"]]
    (kept / "env.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    if not (record.path / "curve.parquet").exists():
        return
    shutil.copy(record.path / "curve.parquet", kept / "curve.parquet")
    curve, every = record.read_curve(), 2
    while (kept / "curve.parquet").stat().st_size > LARGEST and every < len(curve.steps):
        with tempfile.TemporaryDirectory() as folder:
            thinner = RunRecord(Path(folder))
            thinner.write_curve(thin(curve, every))
            shutil.copy(thinner.path / "curve.parquet", kept / "curve.parquet")
        every *= 2


def thin(curve: Curve, every: int) -> Curve:
    """Every so many evaluations, and of those between all that hold a group's lowest or highest value of their stretch,
    so that minima and the dips behind switches stay what they were; first and last of each task too."""
    number = len(curve.steps)
    stretch = np.arange(number) // every
    chosen = np.zeros(number, np.bool_)
    edges = np.flatnonzero(np.diff(curve.task))
    chosen[np.r_[0, edges, edges + 1, number - 1]] = True
    starts = np.flatnonzero(np.r_[True, np.diff(stretch) != 0])
    chosen[starts] = True
    for value in (curve.mean_accuracy, -curve.mean_accuracy):
        low = np.fmin.reduceat(value, starts)[stretch]
        chosen |= value == low
    for group in range(len(curve.groups)):  # the lowest of each task: what minima are taken from
        for task in range(curve.num_tasks):
            values = curve.accuracy[curve.during(task), group]
            if np.isfinite(values).any():
                chosen[curve.during(task).start + int(np.nanargmin(values))] = True
    return Curve.of(
        steps=curve.steps[chosen], task=curve.task[chosen], phase=curve.phase[chosen], position=curve.position[chosen],
        hits=curve.hits[chosen], valid=curve.valid[chosen], totals=curve.totals, groups=curve.groups,
        group_task=curve.group_task, task_ends=curve.task_ends,
    )  # fmt: skip


def table(rows: dict[tuple[str, ...], list[dict[str, float | None]]], columns: tuple[str, ...]) -> list[str]:
    """Mean ± standard deviation over seeds; metrics that no row has are left out."""
    stats = {key: aggregate([{c: s.get(c) for c in columns} for s in summaries]) for key, summaries in rows.items()}
    shown = [column for column in columns if any(column in found for found in stats.values())]
    lines = [
        "| scenario | method | set | backbone | seeds | " + " | ".join(shown) + " |",
        "|---" * (5 + len(shown)) + "|",
    ]
    for key, found in stats.items():
        cells = [
            "–" if column not in found
            else f"{found[column].mean:.3f}" + (f" ± {found[column].std:.3f}" if found[column].std is not None else "")
            for column in shown
        ]  # fmt: skip
        lines.append(f"| {' | '.join(key)} | {len(rows[key])} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:]) or COLUMNS)
