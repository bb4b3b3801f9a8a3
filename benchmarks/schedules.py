"""What sparse evaluation schedules miss of min-ACC and WC-ACC, on recorded runs that were evaluated at every iteration.

python benchmarks/schedules.py CHOSEN-ON ... --fresh OTHER ... > results/benchmarks/schedules.md

Each argument is a folder of records of one method on one scenario (`<runs>/<scenario>/<method>`), run with
`--eval-every 1`; fresh: not among the runs that the rule was chosen on. The schedules are thinned out of those curves
afterwards, so all compare the same training.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clbench.metrics import Curve, stability
from clbench.metrics.schedule_error import (
    ScheduleError,
    min_accuracy_error,
    thinned,
    worst_case_accuracy_error,
)
from clbench.store import RunRecord

SCHEDULES = ((50, 10), (20, 10), (50, 5), (50, 25), (100, 10), (20, 5), (10, 5), (10, 10), (10, 20), (25, 25), (0, 10))
METRICS: tuple[tuple[str, Callable, Callable], ...] = (
    ("min-ACC", stability.min_accuracy, min_accuracy_error),
    ("WC-ACC", stability.worst_case_accuracy, worst_case_accuracy_error),
)
HEAD = """# What sparse evaluation schedules miss

Runs that were evaluated at every iteration; each schedule (every one of the first `dense` steps of a task, then every
`every`-th, and the last) is thinned out of the recorded curve, so the training is the same. On a fixed subset a thinned
minimum can only be higher. Error: min-ACC (WC-ACC) of the thinned curve minus that of the whole, in points, mean and
largest over the seeds. Bounds as in `clbench/metrics/schedule_error.py`, which says what each assumes; "held": in how
many runs the error was at most the bound, of those in which it is stated. Both bounds come from the thinned curve
alone. Evaluations: share of the iterations.

The rule behind the bounds was chosen on the runs of the first part, the fifth of five that were tried: (1) largest
one-step change and deepest dip anywhere; (2) from the calm half of a task's opening only; (3) openings of 20 steps and
more, which held on digits and failed on mnist; (4) the lowest point must come before the calm half, which failed there
too; (5) openings of 50 steps and more, kept. The runs of the second part were made after that and changed nothing.

```
clbench run --method er --scenario split-digits --seeds 0-4 --eval-every 1 --out chosen
clbench run --method er --scenario split-mnist --scenario-set dataset=mnist-subset --scenario-set per_class=400 \\
    --batch-size 10 --epochs 2 --seeds 0-2 --eval-every 1 --out chosen
clbench run --method er --scenario split-digits --seeds 10-14 --eval-every 1 --out fresh
clbench run --method derpp --scenario split-digits --seeds 10-14 --eval-every 1 --out fresh
clbench run --method er --scenario permuted-digits --seeds 10-12 --eval-every 1 --out fresh
clbench run --method er --scenario split-fashion-mnist --scenario-set dataset=fashion-mnist-subset \\
    --scenario-set per_class=400 --batch-size 10 --epochs 2 --seeds 10-12 --eval-every 1 --out fresh
python benchmarks/schedules.py chosen/*/er --fresh fresh/*/* > results/benchmarks/schedules.md
```
"""


def points(values: list[float]) -> str:
    return f"{100 * float(np.mean(values)):.2f}, {100 * max(values):.2f}"


Claims = list[tuple[float, ScheduleError]]  # error of a thinned run, and what was stated of it


def bound(claims: list[tuple[float, float]]) -> str:
    """Mean bound in points, and in how many runs it held."""
    if not claims:
        return "– | –"
    held = sum(error <= most + 1e-12 for error, most in claims)
    return f"{100 * float(np.mean([most for _, most in claims])):.2f} | {held} of {len(claims)}"


def dips(claims: Claims) -> list[tuple[float, float]]:
    return [(error, stated.dip) for error, stated in claims if stated.dip is not None]


def slopes(claims: Claims) -> list[tuple[float, float]]:
    return [(error, stated.slope) for error, stated in claims]


def table(curves: list[Curve]) -> tuple[list[str], Claims]:
    """Lines of the table, and every bound on min-ACC that was stated."""
    out, of_minimum = [], []
    for dense, every in SCHEDULES:
        thin = [thinned(curve, every, dense) for curve in curves]
        share = np.mean([len(t.steps) / len(c.steps) for t, c in zip(thin, curves, strict=True)])
        for name, metric, error_of in METRICS:
            errors = [metric(t).value - metric(c).value for t, c in zip(thin, curves, strict=True)]
            stated: list[ScheduleError | None] = [error_of(t) for t in thin]
            claims = [(error, found) for error, found in zip(errors, stated, strict=True) if found is not None]
            cells = f"{points(errors)} | {bound(dips(claims))} | {bound(slopes(claims))}"
            out.append(f"| {dense} | {every} | {share:.2f} | {name} | {cells} |")
            of_minimum += claims if name == "min-ACC" else []
    return out, of_minimum


def part(title: str, folders: list[Path]) -> None:
    claims: Claims = []
    print(f"## {title}\n")
    for folder in folders:
        records = [RunRecord(path) for path in sorted(folder.iterdir()) if (path / "DONE").exists()]
        curves = [record.read_curve() for record in records]
        spec = records[0].read_spec()
        values = ", ".join(f"{name} {100 * np.mean([m(c).value for c in curves]):.1f}" for name, m, _ in METRICS)
        print(f"### {spec.method} on {spec.scenario}\n")
        print(
            f"{len(curves)} seeds, {', '.join(spec.datasets)}, {curves[0].steps[-1]} steps in {spec.num_tasks} tasks, "
            f"{curves[0].totals.min()} to {curves[0].totals.max()} test images per group; "
            f"at every iteration {values}.\n"
        )
        print("| dense | every | evaluations | of | error: mean, largest | dip bound | held | slope bound | held |")
        print("|---|---|---|---|---|---|---|---|---|")
        found, stated = table(curves)
        claims += stated
        print("\n".join(found), "\n")
    dip, slope = (bound(kind(claims)).partition(" | ")[2] for kind in (dips, slopes))
    print(
        f"Together, each run under each schedule that states one: `dip` held in {dip}, `slope` in {slope} (min-ACC).\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen_on", type=Path, nargs="+")
    parser.add_argument("--fresh", type=Path, nargs="+", default=[])
    given = parser.parse_args()
    print(HEAD)
    part("Runs that the rule was chosen on", given.chosen_on)
    if given.fresh:
        part("Fresh runs", given.fresh)


if __name__ == "__main__":
    main()
