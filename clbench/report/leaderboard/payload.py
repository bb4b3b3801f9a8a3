"""What the page is made from: plain values, small, in the order in which the page shows them."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from clbench.errors import ClbenchError
from clbench.metrics import find_metric, list_metrics
from clbench.metrics.curve import IntArray
from clbench.report.leaderboard.beside import Beside, beside_board, beside_row, changed_params
from clbench.report.leaderboard.boards import CURVE_METRICS, Board, Row
from clbench.report.leaderboard.curves import confusion_of, pack, pack_curve, pack_matrix
from clbench.report.leaderboard.overall import overall
from clbench.report.leaderboard.records import LeftOut, Run, hide_folders, last_environment
from clbench.report.leaderboard.statistics import holm, pair_up, paired_test
from clbench.report.leaderboard.tables import about, remarks, seed_list, seed_of, shown_metrics
from clbench.store.schema import Spec

__all__ = ["Payload", "command_of", "make_payload"]

T = TypeVar("T")
MAX_TESTED = 12  # rows of a board that are tested against each other: the best by its first metric
CURVE_NUMBERS = 2_200_000  # numbers in all curves of a page together, before packing
CONFUSION_ROWS = 4_000_000  # predictions that are read for confusion matrices
CONFUSION_BYTES = 1_500_000  # of packed confusion matrices


@dataclass
class Payload:
    """content: the page's data.  blobs: name -> packed curve (`c<run>`), matrix (`m`), confusion (`k`).
    problems: files that could not be read, named."""

    content: dict[str, Any]
    blobs: dict[str, str] = field(default_factory=dict)
    problems: list[LeftOut] = field(default_factory=list)


def make_payload(boards: Sequence[Board], left_out: Sequence[LeftOut], made: Mapping[str, Any]) -> Payload:
    """Everything the page shows. made: when, by which version, from which folders."""
    payload = Payload({})
    runs = [run for board in boards for row in board.rows for run in sorted(row.all_runs, key=seed_of)]
    number = {id(run): index for index, run in enumerate(runs)}
    pool = Pool()
    written = [_run(run, pool, payload) for run in runs]
    groups = _pack_curves(runs, payload)
    counted = [run for board in boards for row in board.rows for run in row.runs.values()]
    _pack_confusions(counted, number, groups, payload)
    used = {key for board in boards for row in board.rows for key in row.stats}
    keys = list(dict.fromkeys(key for board in boards for key in shown_metrics(board)))
    payload.content = {
        "made": dict(made),
        "metrics": [
            {"key": m.key, "title": m.title, "formula": m.formula, "source": m.source, "unit": m.unit,
             "higher": m.higher_is_better, "curve": m.key in CURVE_METRICS}
            for m in list_metrics() if m.key in used
        ],
        "boards": [_board(board, number) for board in boards],
        "runs": written,
        "environments": pool.items,
        "overall": [_overall(boards, key) for key in keys],
        "left_out": [[item.name, item.why] for item in [*left_out, *payload.problems]],
    }  # fmt: skip
    return payload


class Pool:
    """Equal things once: environments and commands of hundreds of runs are mostly the same."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._index: dict[str, int] = {}

    def add(self, item: Any) -> int:
        key = repr(item)
        if key not in self._index:
            self._index[key] = len(self.items)
            self.items.append(item)
        return self._index[key]


# -- runs -------------------------------------------------------------------------------------------------------------
def _run(run: Run, pool: Pool, payload: Payload) -> dict[str, Any]:
    entries, problem = last_environment(run)
    if problem:
        payload.problems.append(LeftOut(run.name, problem))
    order, seed = seed_of(run)
    out: dict[str, Any] = {
        "name": run.name, "state": run.state, "reason": run.reason, "order": order, "seed": seed,
        "fingerprint": run.known.scenario_fingerprint, "device": run.known.device_type, "again": command_of(run.known),
        "starts": [
            [entry.started, pool.add(_environment(entry.model_dump())), hide_folders(shlex.join(entry.command)),
             [hide_folders(note) for note in entry.notes]]
            for entry in entries
        ],
    }  # fmt: skip
    if run.summary:
        keys = [key for metric in list_metrics() for key in metric.keys]
        out["metrics"] = {key: _round(run.summary[key]) for key in keys if run.summary.get(key) is not None}
        out["times"] = {key: _round(value) for key, value in run.summary.get("times", {}).items()}
        out["weights"] = run.summary.get("weights_sha256", "")
    return out


def _environment(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in entry.items() if key not in ("started", "command", "notes") and value is not None
    }


def command_of(spec: Spec) -> str:
    """A command that asks for the same run: what was given by hand or tuned is given, the rest is looked up again."""

    def given(source: str) -> bool:
        return source.startswith(("--", "tuned on", "search on"))

    method = f"{spec.method}.py" if spec.method_file else spec.method
    words = ["clbench", "run", "--method", method, "--scenario", spec.scenario, "--seeds", str(spec.seed)]
    if spec.order_seed != spec.seed:
        words += ["--order-seed", str(spec.order_seed)]
    for name, entry in spec.hyperparameters.items():
        if given(entry.source):
            words += ["--set", f"{name}={_word(entry.value)}"]
    for name, value in _changed(spec).items():
        words += ["--scenario-set", f"{name}={_word(value)}"]
    if given(spec.sources.get("backbone", "")):
        words += ["--backbone", spec.backbone]
        for name, value in spec.backbone_options.items():
            words += ["--backbone-set", f"{name}={_word(value)}"]
    if spec.weights:
        words += ["--weights", spec.weights]
    for name in (
        "batch_size",
        "epochs",
        "updates_per_batch",
        "train_view",
        "test_view",
        "mask",
        "eval_every",
        "eval_per_group",
    ):
        if given(spec.sources.get(name, "")):
            words += [f"--{name.replace('_', '-')}", str(getattr(spec, name))]
    if spec.precision != "fp32":
        words += ["--precision", spec.precision]
    if spec.contaminated:
        words.append("--allow-contamination")
    return shlex.join(words)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def _changed(spec: Spec) -> dict[str, Any]:
    return changed_params(Board("", spec, "", [], []))


# -- curves, matrices, confusions -------------------------------------------------------------------------------------
def _pack_curves(runs: Sequence[Run], payload: Payload) -> dict[int, tuple[IntArray, IntArray]]:
    """Curves and matrices. Returns, by number of the run, sizes and tasks of its groups, where both files tell them."""
    done = {index: run for index, run in enumerate(runs) if run.state == "done"}
    with_curve = sum((run.path / "curve.parquet").exists() for run in done.values())
    numbers = CURVE_NUMBERS // max(with_curve, 1)
    groups = {}
    for index, run in done.items():
        curve = _read(run, "curve.parquet", run.record.read_curve, payload)
        matrix = _read(run, "matrix.csv", run.record.read_matrix, payload)
        if curve is not None and len(curve.steps):
            payload.blobs[f"c{index}"] = pack_curve(curve, numbers)
        if matrix is not None:
            payload.blobs[f"m{index}"] = pack_matrix(matrix)
        if curve is not None and matrix is not None:
            groups[index] = (matrix.sizes, curve.group_task)
    return groups


def _pack_confusions(
    runs: Sequence[Run], number: Mapping[int, int], groups: Mapping[int, tuple[IntArray, IntArray]], payload: Payload
) -> None:
    """First seeds of all rows come first; whatever does not fit any more is left out, and the page says so."""
    rows = size = 0
    for run in sorted(runs, key=lambda run: (run.known.seed, number[id(run)])):
        if rows > CONFUSION_ROWS or size > CONFUSION_BYTES:
            why = "of some runs are not on the page, to keep it small; report fewer runs to see them"
            payload.problems.append(LeftOut("confusion matrices", why))
            return
        table = _read(run, "predictions.parquet", partial(run.record.read_table, "predictions"), payload)
        if table is None:
            continue
        rows += len(table)
        last = table[table["after_task"] == table["after_task"].max()]
        sizes, group_task = groups.get(number[id(run)], (None, None))
        found = confusion_of(last["target"].to_numpy("int64"), last["prediction"].to_numpy("int64"), sizes, group_task)
        if found is not None:
            blob = pack(found)
            size += len(blob)
            payload.blobs[f"k{number[id(run)]}"] = blob


def _read(run: Run, name: str, read: Callable[[], T], payload: Payload) -> T | None:
    """A file of a record; None if there is none, or if it is damaged, which is then named."""
    if not (run.path / name).exists():
        return None
    try:
        return read()
    except ClbenchError as error:
        payload.problems.append(_problem(run, error))
        return None


def _problem(run: Run, error: ClbenchError) -> LeftOut:
    return LeftOut(
        run.name, "its results are counted, but " + hide_folders(str(error).replace(str(run.path), run.name))
    )


# -- boards -----------------------------------------------------------------------------------------------------------
def _board(board: Board, number: Mapping[int, int]) -> dict[str, Any]:
    spec = board.spec
    return {
        "id": board.id, "label": board.label, "scenario": board.scenario, "about": about(board),
        "setting": spec.setting, "mask": spec.mask, "tasks": spec.num_tasks, "classes": spec.num_classes,
        "datasets": spec.datasets, "data_fingerprint": spec.data_fingerprint,
        "params": [[name, _word(value)] for name, value in spec.scenario_params.items()],
        "changed": sorted(changed_params(board)),
        "fingerprints": [[seed, print_] for seed, print_ in board.fingerprints.items()],
        "notes": board.notes, "metrics": shown_metrics(board),
        "rows": [_row(board, row, number) for row in board.rows],
        "tests": {key: _tests(board, key) for key in shown_metrics(board)},
        "published": [_published(item) for item in beside_board(board)],
    }  # fmt: skip


def _row(board: Board, row: Row, number: Mapping[int, int]) -> dict[str, Any]:
    spec = row.spec
    return {
        "method": row.method, "label": row.label, "backbone": spec.backbone, "pretrained": spec.pretrained_on,
        "own_file": bool(spec.method_file), "badge": row.provenance.badge, "why": row.provenance.text,
        "contaminated": row.contaminated, "schedule": row.schedule, "remarks": remarks(row),
        "hyperparameters": [[name, _word(entry.value), entry.source] for name, entry in spec.hyperparameters.items()],
        "options": _options(spec),
        "stats": {
            key: [*map(_round, (found.mean, found.std, found.half_width)), found.num, board.comparable(row, key)]
            for key, found in row.stats.items()
        },
        "cost": {key: _round(value) for key, value in row.cost.items()},
        "runs": [number[id(run)] for run in sorted(row.all_runs, key=seed_of)],
        "done": len(row.runs), "seeds": seed_list(row.runs), "missing": seed_list(row.missing),
        "pending": [[seed_list([seed]), run.state] for seed, run in sorted(row.pending.items())],
        "published": [_published(item) for item in beside_row(board, row)],
    }  # fmt: skip


def _options(spec: Spec) -> list[list[str]]:
    names = ("backbone", "backbone_options", "weights", "train_view", "test_view", "batch_size", "epochs",
             "updates_per_batch", "mask", "precision", "eval_per_group")  # fmt: skip
    return [[name, _word(getattr(spec, name)), spec.sources.get(name, "")] for name in names]


def _published(item: Beside) -> dict[str, Any]:
    theirs = item.number
    return {
        "method": theirs.method, "metric": theirs.metric, "value": _round(theirs.value),
        "spread": _round(theirs.spread), "kind": theirs.spread_kind,
        "runs": theirs.runs, "status": theirs.status, "source": theirs.source,
        "note": theirs.note, "family": theirs.family, "differs": list(item.differs),
        "setting": [[name, _word(value)] for name, value in theirs.setting.items()],
    }  # fmt: skip


def _tests(board: Board, metric: str) -> dict[str, Any]:
    """All pairs of the best rows that may be compared: [row, other, pairs, difference, half width, p of the t test, the
    same by Holm, p of the sign flip]."""
    rows = [index for index, row in enumerate(board.rows) if board.comparable(row, metric)]
    tested = rows[:MAX_TESTED]
    found = []
    for place, first in enumerate(tested):
        for second in tested[place + 1 :]:
            a, b = board.rows[first].values(metric), board.rows[second].values(metric)
            found.append((first, second, paired_test(pair_up(a, b))))
    corrected = holm([test.t_test for *_, test in found])
    return {
        "rows": tested, "all": len(rows),
        "pairs": [
            [first, second, num, *map(_round, (difference, half, t, holms, flip))]
            for (first, second, (num, difference, half, t, flip)), holms in zip(found, corrected, strict=True)
        ],
    }  # fmt: skip


def _overall(boards: Sequence[Board], metric: str) -> dict[str, Any]:
    found = overall(boards, metric)
    out: dict[str, Any] = {"metric": metric, "title": find_metric(metric).title, "reason": found.reason}
    if found.ranking is not None:
        out |= {"boards": found.boards, "left_out": found.left_out, **found.ranking._asdict()}
    return out


def _round(value: float | None, digits: int = 6) -> float | None:
    """Six significant digits: enough for any table, and short in the page."""
    return None if value is None else float(f"{value:.{digits}g}")
