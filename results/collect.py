"""Turn run records into what is committed: spec.json and summary.json of each run in FOLDER/runs, and FOLDER/table.md.

python results/collect.py RUNS FOLDER [metric ...]
"""

import shutil
import sys
from pathlib import Path

from clbench.metrics import aggregate
from clbench.store import find_runs

COLUMNS = ("final_accuracy", "average_incremental_accuracy", "forgetting", "min_accuracy", "stability_gap")
SHOWN = ("per_class", "tasks", "setting", "shape")  # scenario parameters that a table shows


def main(runs: Path, folder: Path, columns: tuple[str, ...]) -> None:
    rows: dict[tuple[str, ...], list[dict[str, float | None]]] = {}
    for found in find_runs(runs):
        if found.state != "done" or found.spec is None:
            raise SystemExit(f"{found.path} is {found.state}: {found.reason}")
        spec = found.spec
        kept = folder / "runs" / spec.scenario / spec.method / found.path.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("spec.json", "summary.json"):  # env.json holds the command line, and with it folders
            shutil.copy(found.path / name, kept / name)
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
