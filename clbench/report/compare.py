"""Two results side by side: what was run differently, where, and what came out, with a paired test over seeds."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clbench.atomic import atomic_write_bytes
from clbench.errors import InputError
from clbench.metrics import find_metric, list_metrics
from clbench.metrics.curve import Curve, FloatArray
from clbench.report.leaderboard.boards import CURVE_METRICS, Row, board_identity, make_boards, row_identity
from clbench.report.leaderboard.records import Run, gather, last_environment
from clbench.report.leaderboard.statistics import Paired, holm, pair_up, paired_test

__all__ = ["Comparison", "Difference", "Outcome", "compare", "draw_overlay"]


class Difference(NamedTuple):
    """A field that differs. a, b: values as text, `-` where one side lacks it."""

    what: str
    a: str
    b: str


class Outcome(NamedTuple):
    """One metric of both sides. test: paired, a - b; None if the two may not be tested. holm: its corrected p value."""

    metric: str
    a: float | None
    b: float | None
    test: Paired | None
    holm: float | None


@dataclass(frozen=True)
class Comparison:
    """refused: why the numbers may not be compared; empty if they may. seeds: how many runs stand on each side.
    identical: both sides are single runs with the same weights to the bit."""

    a: Row
    b: Row
    refused: tuple[str, ...]
    spec: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    outcomes: tuple[Outcome, ...]
    identical: bool

    @property
    def seeds(self) -> tuple[int, int]:
        return len(self.a.runs), len(self.b.runs)


def compare(first: Path, second: Path, metrics: Sequence[str] | None = None) -> Comparison:
    """Compare two runs, or all seeds of two rows.

    first, second: a run's folder stands for its row: the finished runs beside it that differ in the seed alone. Any
    other folder must hold the runs of one row. Two runs of the same row are compared as they are, run against run.
    metrics: keys; all that either side has by default. Raises InputError for a folder without a finished run, one that
    holds several rows, or an unknown metric.
    """
    a, b = row_of(first), row_of(second)
    if a.identity == b.identity and is_run(first) and is_run(second):
        a, b = _alone(a, first), _alone(b, second)
    refused = tuple(_refusals(a, b))
    keys = [find_metric(key).key for key in metrics] if metrics else [
        metric.key for metric in list_metrics() if metric.key in a.stats or metric.key in b.stats
    ]  # fmt: skip
    tests = {key: paired_test(pair_up(a.values(key), b.values(key))) for key in keys if may_test(a, b, key, refused)}
    corrected = dict(zip(tests, holm([test.t_test for test in tests.values()]), strict=True))
    outcomes = tuple(Outcome(key, _mean(a, key), _mean(b, key), tests.get(key), corrected.get(key)) for key in keys)
    weights = [[run.summary.get("weights_sha256") for run in row.runs.values()] for row in (a, b)]
    identical = len(weights[0]) == len(weights[1]) == 1 and weights[0] == weights[1]
    return Comparison(a, b, refused, spec_differences(a, b), environment_differences(a, b), outcomes, identical)


def is_run(path: Path) -> bool:
    return (path / "spec.json").exists()


def row_of(path: Path) -> Row:
    """The row that a folder stands for."""
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give a run's folder, or one that holds the runs of one method")
    if is_run(path):
        runs, _ = gather([path])
        me = next(iter(runs), None)
        if me is None or me.state != "done":
            raise InputError(f"{path} is no finished run{f' ({me.state}: {me.reason})' if me and me.reason else ''}")
        beside, _ = gather([path.parent])
        runs = [run for run in beside if run.state == "done" and _same_row(run, me)]
    else:
        runs = [run for run in gather([path])[0] if run.state == "done"]
    boards, _ = make_boards(runs)
    rows = [row for board in boards for row in board.rows]
    if not rows:
        raise InputError(f"there is no finished run below {path}")
    if len(rows) > 1:
        some = "; ".join(f"{row.label} on {row.spec.scenario}" for row in rows[:4])
        raise InputError(
            f"{path} holds {len(rows)} rows ({some}{' ...' * (len(rows) > 4)}); give a folder with one, or a run"
        )
    return rows[0]


def _same_row(run: Run, other: Run) -> bool:
    same_board = board_identity(run.known) == board_identity(other.known)
    return same_board and row_identity(run.known) == row_identity(other.known)


def _alone(row: Row, path: Path) -> Row:
    kept = {seed: run for seed, run in row.runs.items() if run.path.resolve() == path.resolve()}
    return Row(row.identity, kept or row.runs, label=row.label)


def _mean(row: Row, key: str) -> float | None:
    return row.stats[key].mean if key in row.stats else None


def may_test(a: Row, b: Row, key: str, refused: Sequence[str]) -> bool:
    """Curve metrics need the same schedule of evaluations on top of comparable runs."""
    if refused or (key in CURVE_METRICS and a.schedule != b.schedule):
        return False
    return key in a.stats and key in b.stats and a.identity != b.identity


def _refusals(a: Row, b: Row) -> list[str]:
    one, other = a.spec, b.spec
    out = []
    for name in ("scenario", "data_fingerprint", "setting", "mask", "protocol_family", "protocol_changes"):
        if getattr(one, name) != getattr(other, name):
            out.append(f"{name.replace('_', ' ')} {getattr(one, name)} against {getattr(other, name)}")
    if one.scenario == other.scenario:
        for name in sorted(one.scenario_params.keys() | other.scenario_params.keys()):
            x, y = one.scenario_params.get(name), other.scenario_params.get(name)
            if x != y:
                out.append(f"scenario parameter {name}={x} against {y}")
    if not out:
        tables = [{run.known.order_seed: run.known.scenario_fingerprint for run in row.runs.values()} for row in (a, b)]
        for seed in sorted(tables[0].keys() & tables[1].keys()):
            if tables[0][seed] != tables[1][seed]:
                out.append(f"order seed {seed} gave table {tables[0][seed][:12]} against {tables[1][seed][:12]}")
    return out


# -- differences ------------------------------------------------------------------------------------------------------
SEEDED = ("seed", "order_seed", "scenario_fingerprint")


def spec_differences(a: Row, b: Row) -> tuple[Difference, ...]:
    """Options, hyperparameters and scenario parameters that differ; seeds only where each side is one run."""
    flat = []
    for row in (a, b):
        spec = row.spec
        content = {
            key: value for key, value in spec.decisive().items() if key not in ("hyperparameters", "scenario_params")
        }
        if len(a.runs) > 1 or len(b.runs) > 1:
            content = {key: value for key, value in content.items() if key not in SEEDED}
            if not spec.pretrained_on and spec.weights is None:
                content.pop("backbone_fingerprint")
        content |= {f"scenario parameter {key}": value for key, value in spec.scenario_params.items()}
        content |= {f"hyperparameter {key}": entry.value for key, entry in spec.hyperparameters.items()}
        content["hyperparameters from"] = row.provenance.badge
        flat.append(content)
    return _differing(flat[0], flat[1])


def environment_differences(a: Row, b: Row) -> tuple[Difference, ...]:
    """Fields of env.json that differ, all starts of all runs taken together."""
    return _differing(_environment(a), _environment(b))


def _environment(row: Row) -> dict[str, Any]:
    found: dict[str, dict[str, None]] = {}
    for run in row.runs.values():
        for entry in last_environment(run)[0]:
            for key, value in entry.model_dump(exclude={"started", "command", "notes"}).items():
                found.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(values) for key, values in found.items()} or {"env.json": "not recorded"}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Difference, ...]:
    return tuple(
        Difference(key, _text(a.get(key, "-")), _text(b.get(key, "-")))
        for key in dict.fromkeys([*a, *b])
        if a.get(key, "-") != b.get(key, "-")
    )


def _text(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# -- curves -----------------------------------------------------------------------------------------------------------
POINTS = 800  # of the common axis


def draw_overlay(found: Comparison, path: Path) -> Path | None:
    """Write a picture of both sides' mean accuracy over the tasks so far; None if neither has a curve.

    Line: mean over seeds; band: lowest to highest seed. The axis is progress through the tasks, so that methods with
    different numbers of steps line up.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(10, 4.6), layout="constrained")
    axes = page.add_subplot()
    num_tasks = 0
    for row, colour, side in ((found.a, "#0072b2", "A"), (found.b, "#d55e00", "B")):
        curves = [run.record.read_curve() for run in row.runs.values() if (run.path / "curve.parquet").exists()]
        curves = [curve for curve in curves if len(curve.steps)]
        if not curves:
            continue
        num_tasks = max(num_tasks, *(curve.num_tasks for curve in curves))
        grid = np.linspace(0, num_tasks, POINTS * num_tasks // max(num_tasks, 1) + 1)
        lines = 100 * np.stack([np.interp(grid, *measured(curve), right=np.nan) for curve in curves])
        label = f"{side}: {row.label}, {len(curves)} seed{'s' * (len(curves) > 1)}"
        axes.plot(grid, lines.mean(axis=0), color=colour, linewidth=1.6, label=label)
        if len(curves) > 1:
            axes.fill_between(grid, lines.min(axis=0), lines.max(axis=0), color=colour, alpha=0.18, linewidth=0)
    if not num_tasks:
        return None
    for task in range(1, num_tasks):
        axes.axvline(task, color="0.35", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    axes.set(
        xlim=(0, num_tasks), ylim=(-2, 102), xlabel="tasks learned", ylabel="accuracy (%), mean over the tasks so far"
    )
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    axes.set_title(
        found.a.spec.scenario if found.a.spec.scenario == found.b.spec.scenario else "", loc="left", fontsize=11
    )
    data = io.BytesIO()
    page.savefig(data, format="png", dpi=150)
    atomic_write_bytes(path, data.getvalue())
    return path


def measured(curve: Curve) -> tuple[FloatArray, FloatArray]:
    """(P,) progress through the tasks, and mean accuracy there, where it was measured."""
    starts = np.r_[0, curve.task_ends][curve.task]
    ends = np.r_[curve.task_ends, curve.steps[-1]][curve.task]
    share = np.divide(curve.steps - starts, ends - starts, out=np.zeros(len(curve.steps)), where=ends > starts)
    keep = np.isfinite(curve.mean_accuracy)
    return (curve.task + np.minimum(share, 1))[keep], curve.mean_accuracy[keep]
