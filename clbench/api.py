"""The suite from Python: the same runs and the same records as the command line's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clbench.errors import ClbenchError, InputError, unknown_name

if TYPE_CHECKING:
    import pandas as pd

    from clbench.learner.estimate import Estimate
    from clbench.learner.resolve import Resolved
    from clbench.learner.run import RunResult
    from clbench.learner.spec import RunSpec
    from clbench.metrics import Aggregate
    from clbench.report.progress import BarProgress, LineProgress

__all__ = ["DryRun", "Results", "dry_run", "load_runs", "make_specs", "parse_seeds", "run"]

MAX_SEEDS = 1000


class Results:
    """Finished runs of one command, one per seed, in the order of the seeds: iterate, index, or ask for the table.

    Each run has `path` (its record), `summary` (every key of `summary.json`) and `status`.
    """

    def __init__(self, runs: Iterable[RunResult], seeds: Iterable[int]) -> None:
        self.runs = tuple(runs)
        self.seeds = tuple(seeds)

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[RunResult]:
        return iter(self.runs)

    def __getitem__(self, index: int) -> RunResult:
        return self.runs[index]

    def __repr__(self) -> str:
        return f"<Results of {len(self)} runs, final accuracy {self.mean('final_accuracy'):.3f}>"

    def aggregate(self) -> dict[str, Aggregate]:
        """Mean, standard deviation and 95 % interval of every metric over the seeds."""
        from clbench.metrics import aggregate, list_metrics

        keys = [key for metric in list_metrics() for key in metric.keys]
        return aggregate({key: run.summary.get(key) for key in keys} for run in self.runs)

    def mean(self, metric: str) -> float:
        """Mean of one metric over the seeds. Raises InputError if it is unknown or was not measured."""
        values = self.aggregate()
        if metric not in values:
            raise unknown_name("metric of these runs", metric, values)
        return values[metric].mean

    def table(self) -> pd.DataFrame:
        """One row per run: seed, path, status, and every plain value of its summary."""
        import pandas as pd

        return pd.DataFrame(
            {"seed": seed, "path": str(run.path), "status": run.status, **plain_values(run.summary)}
            for seed, run in zip(self.seeds, self.runs, strict=True)
        )


def run(
    method: str,
    scenario: str,
    seeds: int | str | Iterable[int] = 0,
    *,
    fresh: bool = False,
    progress: bool = False,
    side_by_side: int = 1,
    track: str | None = None,
    **options: Any,
) -> Results:
    """Run a method on a scenario, one run per seed, and return the results in the order of the seeds.

    method, scenario: an id, an alias, or the path of your own Python file.
    seeds: one, several, or text as on the command line: `"0-2,7"`.
    fresh: start anew beside runs of the same specification, instead of showing or resuming them.
    progress: show it on stderr.
    side_by_side: so many runs take turns step by step in this process, with the results of single runs: they fill a GPU
        that a small network leaves idle; on a CPU there is nothing to gain.
    track: also log finished runs to this MLflow store: `http://HOST:PORT`, `sqlite:///FILE`, or `local` for a sqlite
        file among the records. A server that fails costs a warning; `clbench sync` logs those runs later.
    options: the fields of `clbench.learner.spec.RunSpec`, as `--option` on the command line with `_` for `-`:
        `order_seed`, `set`, `scenario_params`, `backbone`, `backbone_options`, `weights`, `device`, `precision`,
        `mask`, `eval_every`, `eval_per_group`, `batch_size`, `epochs`, `updates_per_batch`, `train_view`, `test_view`,
        `evaluator`, `eval_batch`, `fused`, `cuda_graph`, `compile`, `data`, `out`,
        `allow_contamination`, `checkpoint_every`, `threads`, `keep_weights`, `keep_checkpoint`.

    Raises InputError for what can't be used, RunFailed if a run breaks, KeyboardInterrupt when stopped (its checkpoint
    is saved: the same call goes on). Runs that are finished by then are kept.

        results = clbench.run("er", "split-digits", seeds="0-2", set={"capacity": 200}, out="results/runs")
        results.mean("final_accuracy")
        results.table()[["seed", "final_accuracy", "forgetting"]]
    """
    chosen = parse_seeds(seeds)
    specs = make_specs(method, scenario, chosen, options)
    if side_by_side < 1:
        raise InputError(f"--side-by-side is {side_by_side}, it must be 1 or more")
    if side_by_side > 1:
        runs = run_together(specs, side_by_side, fresh, progress, track)
    else:
        runs = run_each(specs, fresh, progress, track)
    return Results(runs, chosen)


def conclude(result: RunResult, spec: RunSpec, track: str | None) -> None:
    """What follows a run at once, so that a later one that breaks takes nothing along: its picture, and its copy in
    MLflow."""
    from clbench.report.curve import draw

    draw(result.path)
    if track is not None:
        from clbench.tracking.runs import store_uri, track_run

        track_run(result.path, store_uri(track, spec.out))


def run_each(specs: Sequence[RunSpec], fresh: bool, progress: bool, track: str | None) -> list[RunResult]:
    """One run behind the other."""
    from clbench.learner.resolve import resolve
    from clbench.learner.run import run as run_one

    runs = []
    for number, spec in enumerate(specs, 1):
        resolved = resolve(spec)
        label = f"{resolved.found.id} on {resolved.scenario.id}, seed {spec.seed}"
        if len(specs) > 1:
            label += f" ({number} of {len(specs)})"
        with show(label, progress) as display:
            result = run_one(resolved, display, fresh=fresh)
            if display is not None and result.status == "done":
                display.finish(result.summary["steps"])
        conclude(result, spec, track)
        runs.append(result)
    return runs


def run_together(
    specs: Sequence[RunSpec], width: int, fresh: bool, progress: bool, track: str | None
) -> list[RunResult]:
    """`width` runs at a time, taking turns. If some break, the others end, then the first error is raised."""
    from clbench.learner.resolve import resolve
    from clbench.learner.run import RunResult
    from clbench.learner.side_by_side import run_side_by_side
    from clbench.report.progress import Together

    resolved = [resolve(spec) for spec in specs]
    ended: dict[int, RunResult] = {}
    errors: dict[int, ClbenchError] = {}
    with show(f"{resolved[0].found.id} on {resolved[0].scenario.id}, {len(specs)} seeds", progress) as display:
        together = None if display is None else Together(display, len(specs))
        shares = (lambda index: None) if together is None else together.share
        for index, result in run_side_by_side(resolved, width, shares, fresh=fresh):
            if isinstance(result, RunResult):
                ended[index] = result
                conclude(result, specs[index], track)
            else:
                errors[index] = result
        if display is not None:
            display.finish(sum(each.summary["steps"] for each in ended.values()))
    if errors:
        first = min(errors)
        others = f" ({len(ended)} of {len(specs)} runs are done)" if ended else ""
        raise type(errors[first])(f"seed {specs[first].seed}: {errors[first]}{others}")
    return [ended[index] for index in range(len(specs))]


class DryRun(NamedTuple):
    """What `run` would do. resolved: the first seed's run with every value and its source in `document`; folders: where
    the records would go (existing ones are shown or resumed); estimate: cost of each run."""

    resolved: Resolved
    folders: list[Path]
    estimate: Estimate


def dry_run(method: str, scenario: str, seeds: int | str | Iterable[int] = 0, **options: Any) -> DryRun:
    """Look up everything that `run` with the same arguments needs, and try a few seconds of it; writes no record.

    Raises InputError for what can't be used, before anything is tried.
    """
    specs = make_specs(method, scenario, parse_seeds(seeds), options)
    from clbench.learner.estimate import estimate
    from clbench.learner.resolve import resolve
    from clbench.learner.run import run_folder

    resolved = [resolve(spec) for spec in specs]
    return DryRun(resolved[0], [run_folder(each) for each in resolved], estimate(resolved[0]))


def load_runs(folder: str | Path = "results/runs") -> pd.DataFrame:
    """Every run below `folder` as one row: what was run, its state, and every metric of its summary.

    state: `done`, `unfinished`, or `damaged` (with the reason). Raises InputError if there is no such folder.

        runs = clbench.load_runs("results/runs")
        runs = runs[runs.state == "done"]
        runs.groupby(["scenario", "method"])["final_accuracy"].agg(["mean", "std", "count"])
    """
    from clbench import store

    return store.load_runs(Path(folder))


def make_specs(method: str, scenario: str, seeds: Iterable[int], options: Mapping[str, Any]) -> list[RunSpec]:
    """One RunSpec per seed. Raises InputError for an unknown option or a value of the wrong type or range."""
    from pydantic import ValidationError

    from clbench.learner.spec import RunSpec

    known = RunSpec.model_fields.keys() - {"method", "scenario", "seed"}
    for name in options:
        if name not in known:
            raise unknown_name("option", name, known)
    try:
        return [RunSpec(method=method, scenario=scenario, seed=seed, **options) for seed in seeds]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        reason = first["msg"].removeprefix("Input should be ")
        raise InputError(f"--{name} is {first['input']!r}, it should be {reason}") from None


def parse_seeds(seeds: int | str | Iterable[int]) -> list[int]:
    """Read `"0-2,7"` as [0, 1, 2, 7]; order is kept, repetitions are dropped. Raises InputError.

    >>> parse_seeds("0-2,7")
    [0, 1, 2, 7]
    """
    if isinstance(seeds, int):
        seeds = [seeds]
    if not isinstance(seeds, str):
        out = list(dict.fromkeys(int(seed) for seed in seeds))
        if not out or min(out) < 0:
            raise InputError(f"seeds are {out}, give one or more whole numbers from 0 up")
        return out
    chosen: dict[int, None] = {}
    for part in seeds.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit() and (not dash or (last.isascii() and last.isdigit()))):
            raise InputError(f'--seeds is {seeds!r}, write it as "0", "0-4" or "0-2,7"')
        low, high = int(first), int(last if dash else first)
        if high < low or high - low >= MAX_SEEDS:
            raise InputError(f"--seeds has the range {part.strip()!r}, it must go up, by less than {MAX_SEEDS}")
        chosen |= dict.fromkeys(range(low, high + 1))
    return list(chosen)


def show(label: str, progress: bool) -> AbstractContextManager[BarProgress | LineProgress | None]:
    """Where a run tells how far it is."""
    if not progress:
        return nullcontext()
    from clbench.report.progress import live_progress

    return live_progress(label)


def plain_values(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary flattened to one level: `times.train_s` for what is nested, lists left out."""
    out: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            out |= {f"{key}.{inner}": item for inner, item in plain_values(value).items()}
        elif not isinstance(value, list | tuple):
            out[key] = value
    return out
