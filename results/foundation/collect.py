"""Turn the run records of `run.sh` into what is committed: spec.json and summary.json of each run, and table.md.

python results/foundation/collect.py results/runs
"""

import shutil
import sys
from pathlib import Path

from clbench.metrics import aggregate
from clbench.store import find_runs

HERE = Path(__file__).parent
COLUMNS = ("final_accuracy", "average_incremental_accuracy", "forgetting", "min_accuracy", "stability_gap")


def main(folder: Path) -> None:
    rows: dict[tuple[str, ...], list[dict[str, float | None]]] = {}
    for found in find_runs(folder):
        if found.state != "done" or found.spec is None or found.summary is None:
            raise SystemExit(f"{found.path} is {found.state}: {found.reason}")
        spec = found.spec
        kept = HERE / "runs" / spec.scenario / spec.method / found.path.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("spec.json", "summary.json"):  # env.json holds the command line, and with it folders
            shutil.copy(found.path / name, kept / name)
        cap = spec.scenario_params.get("per_class")
        given = ", ".join(f"{k}={v.value}" for k, v in spec.hyperparameters.items() if v.source == "--set")
        key = (spec.scenario + (f", per_class={cap}" if cap else ""), spec.method, given or "defaults", spec.backbone)
        rows.setdefault(key, []).append(found.summary)
    lines = [
        "| scenario | method | set | backbone | seeds | " + " | ".join(COLUMNS) + " |",
        "|---" * (5 + len(COLUMNS)) + "|",
    ]
    for key, summaries in sorted(rows.items()):
        stats = aggregate([{column: s[column] for column in COLUMNS} for s in summaries])
        cells = [
            "–" if column not in stats
            else f"{stats[column].mean:.3f}" + (f" ± {stats[column].std:.3f}" if stats[column].std is not None else "")
            for column in COLUMNS
        ]  # fmt: skip
        lines.append(f"| {' | '.join(key)} | {len(summaries)} | {' | '.join(cells)} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
