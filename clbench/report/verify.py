"""Is a record true to itself, and does the run give the same again?

Without a rerun the metrics of `summary.json` are computed once more from the stored curve and matrix, the matrix from
the stored predictions, and the digest from the stored weights. With a rerun the run is made again from its spec, in a
folder of its own, and compared to the bit: weights, curve, matrix, predictions, metrics.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clbench.errors import ClbenchError, InputError
from clbench.metrics import Curve, list_metrics, per_level, summarise
from clbench.metrics.curve import IntArray
from clbench.report.leaderboard.boards import CURVE_METRICS, preset_params
from clbench.store import RunRecord
from clbench.store.record import Matrix
from clbench.store.schema import Spec

if TYPE_CHECKING:
    from clbench.learner.spec import RunSpec
    from clbench.report.progress import BarProgress, LineProgress
    from clbench.scenarios.model import Scenario

__all__ = ["Check", "Rerun", "rerun", "verify"]

CLOSE = 1e-12  # sums of the same numbers may be rounded differently by another numpy
FILES = ("matrix.csv", "curve.parquet", "predictions.parquet", "losses.parquet")


class Check(NamedTuple):
    """ok: None if it could not be checked, then `detail` says why."""

    name: str
    ok: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Rerun:
    """What a rerun needs and the record does not hold. weights, method, scenario: files, where the run used such.
    threads: those of the record by default."""

    data: tuple[Path, ...] = ()
    weights: Path | None = None
    method: Path | None = None
    scenario: Path | None = None
    device: str | None = None
    threads: int | None = None
    out: Path | None = None


def verify(path: Path, data: Sequence[Path] = ()) -> list[Check]:
    """Check a record, a run's folder, against itself. data: folders searched for data, for what only the scenario's
    table tells (which classes of an online stream had begun to count).

    Raises InputError if there is no record in `path`, or it has no spec or summary that can be read.
    """
    record = RunRecord(path)
    if (path / "study.json").exists() or path.name == "study.json" or path.parent.name == "evaluation":
        raise InputError(
            f"{path} belongs to a study; `clbench protocol show {path} --records` compares it with its runs"
        )
    spec, summary = record.read_spec(), stored_summary(record)
    checks = [_files(record)]
    try:
        matrix = record.read_matrix() if (path / "matrix.csv").exists() else None
        curve = record.read_curve() if (path / "curve.parquet").exists() else None
        if matrix is None:
            checks.append(Check("metrics", None, "there is no matrix.csv to compute them from"))
        else:
            checks.append(_matrix_from_predictions(record, matrix, curve))
            checks += _metrics(spec, summary, matrix, curve, data)
        checks.append(_weights(record, summary))
    except InputError as error:
        checks.append(Check("stored files", False, str(error)))
    return checks


def stored_summary(record: RunRecord) -> dict[str, Any]:
    """The summary without what an older record lacks, which is read as None: metrics that came later."""
    summary = record.read_summary()
    written = json.loads((record.path / "summary.json").read_bytes())
    return {key: value for key, value in summary.items() if key in written}


def _files(record: RunRecord) -> Check:
    if not record.is_done():
        return Check("files", None, "there is no DONE: a committed record without checksums, or an unfinished run")
    problems = record.damage()
    return Check("files", not problems, "; ".join(problems) or "sizes and sha256 are those that DONE vouches for")


def _matrix_from_predictions(record: RunRecord, matrix: Matrix, curve: Curve | None) -> Check:
    """Entries of groups that had begun to count: before that there is no class to answer with, and an answer that
    happens to be right is none."""
    name = "accuracy matrix from predictions"
    if not (record.path / "predictions.parquet").exists():
        return Check(name, None, "there is no predictions.parquet")
    table = record.read_table("predictions")
    right = (table["target"].to_numpy() == table["prediction"].to_numpy()).reshape(-1, int(matrix.sizes.sum()))
    edges = np.r_[0, np.cumsum(matrix.sizes)]
    hits = np.pad(np.cumsum(right, axis=1, dtype=np.int64), ((0, 0), (1, 0)))  # a group may have no rows
    again = np.diff(hits[:, edges], axis=1) / np.maximum(matrix.sizes, 1)
    if again.shape != matrix.accuracy.shape:
        return Check(
            name, False, f"predictions give a matrix of {again.shape}, matrix.csv holds {matrix.accuracy.shape}"
        )
    begun = np.ones(again.shape, np.bool_) if curve is None else _begun(curve, len(again))
    wrong = np.argwhere((np.abs(again - matrix.accuracy) > CLOSE) & begun)
    if len(wrong):
        task, group = (int(index) for index in wrong[0])
        return Check(
            name, False, f"{len(wrong)} entries differ, first after task {task} on {matrix.groups[group]}: "
            f"{matrix.accuracy[task, group]:.6f} stored, {again[task, group]:.6f} from predictions",
        )  # fmt: skip
    return Check(name, True, f"{begun.sum()} entries agree")


def _begun(curve: Curve, num_tasks: int) -> np.ndarray:
    """(K, G) bool: groups of the tasks so far, and of the others those that the curve shows evaluated by then."""
    seen = [curve.valid[: curve.during(task).stop].any(axis=0) for task in range(num_tasks)]
    owner = curve.group_task
    return np.stack(seen) | ((owner >= 0) & (owner <= np.arange(num_tasks)[:, None]))


def _metrics(
    spec: Spec, summary: Mapping[str, Any], matrix: Matrix, curve: Curve | None, data: Sequence[Path]
) -> Iterator[Check]:
    scenario = None
    group_task = curve.group_task if curve is not None else np.arange(len(matrix.groups))
    needs_table = bool((group_task < 0).any()) or any(summary.get(key) is not None for key in FROM_TABLE)
    reason = "needs the table of the scenario"
    if needs_table:
        try:
            scenario = build_scenario(spec, data)
        except ClbenchError as error:
            reason = f"needs the table of the scenario, and {error}"
    again = recompute(spec, matrix, curve, group_task, scenario)
    left: dict[str, str] = {}  # metric -> why it is not recomputed
    if scenario is None:
        left = dict.fromkeys([*FROM_TABLE, *FROM_ACTIVE * bool((group_task < 0).any())], reason)
    if curve is not None and len(curve.steps) < summary["evaluations"]:
        left |= dict.fromkeys(CURVE_METRICS, "the stored curve is thinned")
    left |= {f"{key}_se": why for key, why in left.items()}
    keys = [key for metric in list_metrics() for key in metric.keys if key in summary]
    left |= dict.fromkeys((key for key in keys if key.endswith(FROM_PARTS)), "records do not hold the parts of subsets")
    checked = [key for key in keys if key not in left]
    wrong = [key for key in checked if not _close(summary[key], again[key])]
    said = [f"{key} is {summary[key]} in summary.json and {again[key]} from the stored files" for key in wrong[:5]]
    yield Check("metrics", not wrong, "; ".join(said) or f"{len(checked)} metrics agree")
    skipped = {key: why for key, why in left.items() if summary.get(key) is not None}
    if skipped:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        yield Check("other metrics", None, f"{', '.join(sorted(skipped))} not recomputed: {reasons}")
    if scenario is not None and curve is not None and summary.get("levels"):
        levels = np.array([group.level for group in scenario.groups])
        found = per_level(
            levels, matrix.accuracy, curve, _active(scenario, spec), matrix.sizes, scenario.defaults.eval_samples
        )
        yield Check("levels", _close(found, summary["levels"]), "accuracies per label level")


FROM_TABLE = ["facilitation_slope", "facilitation_missing", "f_last"]
FROM_PARTS = ("_corrected", "_low", "_high")
FROM_ACTIVE = ["final_accuracy", "average_incremental_accuracy", "forgetting", "a_last", "last"]


def recompute(
    spec: Spec, matrix: Matrix, curve: Curve | None, group_task: IntArray, scenario: "Scenario | None"
) -> dict[str, float | None]:
    """The metrics from stored files, as the run computed them. scenario: None where its data is not here."""
    own, active, period = None, None, spec.eval_samples
    if scenario is not None:
        from clbench.learner.run import own_samples

        own, active = own_samples(scenario), _active(scenario, spec)
        period = scenario.defaults.eval_samples if scenario.online else None
    return summarise(
        matrix.accuracy, group_task=group_task, sizes=matrix.sizes, setting=spec.setting, mask=spec.mask,
        before=matrix.before, curve=curve, active=active, sample_period=period, own=own,
    )  # fmt: skip


def _active(scenario: "Scenario", spec: Spec) -> np.ndarray:
    """(K, G) bool: groups that had begun to count after each task (their task has come, a class of theirs has)."""
    unlocks = np.array(
        [int(scenario.first_seen[group.targets].min()) if len(group.targets) else 0 for group in scenario.groups]
    )
    owner = np.array([-1 if group.task is None else group.task for group in scenario.groups])
    ends = np.array([scenario.offsets[index + 1] for index in range(spec.num_tasks)])
    begun: np.ndarray = (owner <= np.arange(spec.num_tasks)[:, None]) & (unlocks < ends[:, None])
    return begun


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if a is None or b is None:
        return a is b
    return bool(abs(a - b) <= CLOSE * max(1.0, abs(b)))


def _weights(record: RunRecord, summary: Mapping[str, Any]) -> Check:
    path = record.path / "weights.safetensors"
    if not path.exists():
        return Check("weights", None, "not kept (--keep-weights keeps them)")
    from hashlib import sha256

    import torch
    from safetensors.torch import load

    digest = sha256()
    for name, value in sorted(load(path.read_bytes()).items()):
        digest.update(name.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    same = digest.hexdigest() == summary["weights_sha256"]
    return Check("weights", same, "sha256 of the kept weights" + ("" if same else " is not that of summary.json"))


def build_scenario(spec: Spec, data: Sequence[Path]) -> "Scenario":
    """The scenario's table again, from the labels of its data. Raises InputError if the data is not here, or if it
    gives another table than the run had."""
    from clbench import scenarios
    from clbench.data import load_all

    preset = scenarios.find(spec.scenario).with_params(changed_params(spec))
    stores = load_all(preset.datasets, roots=tuple(data), order=preset.row_order, size=preset.size, scenario=preset.id)
    built = scenarios.build(preset, [store.table() for store in stores], spec.order_seed)
    if built.fingerprint != spec.scenario_fingerprint:
        raise InputError(
            f"{spec.scenario} gives table {built.fingerprint[:12]} here, the run had {spec.scenario_fingerprint[:12]}: "
            "other data, or another version of the builder"
        )
    return built


def changed_params(spec: Spec) -> dict[str, Any]:
    """Parameters to give to the preset to get the run's: those that are not its own values."""
    preset = preset_params(spec.scenario)
    if preset is None:
        return dict(spec.scenario_params)
    changed = {key: value for key, value in spec.scenario_params.items() if preset.get(key, ...) != value}
    if ",".join(sorted(spec.datasets)) != preset["dataset"]:
        changed["dataset"] = ",".join(spec.datasets)
    return changed


# -- again ------------------------------------------------------------------------------------------------------------
def rerun(path: Path, needs: Rerun, progress: "BarProgress | LineProgress | None" = None) -> list[Check]:
    """Make the run again and compare. Raises InputError for a record that can't be read or data, weights or a method
    file that is not here; RunFailed if the run breaks."""
    record = RunRecord(path)
    spec, summary = record.read_spec(), stored_summary(record)
    from clbench.learner.resolve import resolve
    from clbench.learner.run import run

    with tempfile.TemporaryDirectory(prefix="clbench-verify-") as folder:
        request = request_of(record, spec, needs, needs.out or Path(folder))
        resolved = resolve(request)
        differing, later = spec_differences(spec, Spec.model_validate(resolved.document))
        if differing:
            return [Check("spec", False, f"this installation resolves it differently: {'; '.join(differing[:5])}")]
        result = run(resolved, progress, fresh=True)
        added = f"; options that came later are at their defaults: {', '.join(later)}" if later else ""
        checks = [Check("spec", True, f"every option of the record is the same{added}")]
        same = result.summary["weights_sha256"] == summary["weights_sha256"]
        checks.append(
            Check("weights", same, "sha256 of the deployed weights " + ("is the same" if same else "differs"))
        )
        checks += [_same_file(record, RunRecord(result.path), name) for name in FILES]
        keys = [key for metric in list_metrics() for key in metric.keys if key in summary]
        wrong = [
            f"{key}: {summary[key]} then, {result.summary[key]} now"
            for key in keys
            if summary[key] != result.summary[key]
        ]
        checks.append(Check("metrics", not wrong, "; ".join(wrong[:5]) or f"{len(keys)} metrics are equal to the bit"))
        if any(check.ok is False for check in checks):
            checks.append(Check("environment", None, environments(record, RunRecord(result.path))))
    return checks


def request_of(record: RunRecord, spec: Spec, needs: Rerun, out: Path) -> "RunSpec":
    """The run that the record describes: every value given, whatever recipes say today."""
    from clbench.learner.spec import RunSpec

    for what, digest, given in (("method", spec.method_file, needs.method), ("weights", spec.weights, needs.weights)):
        if digest is not None and given is None:
            name = spec.weights if what == "weights" else f"{spec.method}.py"
            raise InputError(f"the run used {what} of a file ({name}); give it with --{what} FILE")
    entries = record.read_env()
    threads = needs.threads or (entries[-1].num_threads if entries else None)
    asked = spec.sources.get("eval_every", "").startswith("--")
    return RunSpec(
        method=str(needs.method or spec.method), scenario=str(needs.scenario or spec.scenario), seed=spec.seed,
        order_seed=spec.order_seed, set={key: entry.value for key, entry in spec.hyperparameters.items()},
        scenario_params=changed_params(spec), backbone=spec.backbone, backbone_options=spec.backbone_options,
        weights=needs.weights, device=needs.device or spec.device_type, precision=spec.precision, mask=spec.mask,
        eval_every=spec.eval_every if asked else None, eval_per_group=spec.eval_per_group, batch_size=spec.batch_size,
        epochs=spec.epochs, updates_per_batch=spec.updates_per_batch, train_view=spec.train_view,
        test_view=spec.test_view, data=needs.data, out=out, allow_contamination=spec.contaminated is not None,
        threads=threads, compile=spec.compile, cuda_graph=spec.cuda_graph, fused=spec.fused, evaluator=spec.evaluator,
        eval_batch=spec.eval_batch,
    )  # fmt: skip


def spec_differences(then: Spec, now: Spec) -> tuple[list[str], list[str]]:
    """What a record and its resolution today say differently, and what exists today that the record does not know: an
    option that came later, at its default."""
    a, b = then.decisive(), now.decisive()
    ignored = {"weights"} if now.backbone_fingerprint == then.backbone_fingerprint else set()
    nested = ("hyperparameters", "scenario_params")
    fields = [
        (key, a.get(key, ...), b.get(key, ...)) for key in dict.fromkeys([*a, *b]) if key not in {*nested, *ignored}
    ]
    for key in nested:
        fields += [(name, a[key].get(name, ...), b[key].get(name, ...)) for name in dict.fromkeys([*a[key], *b[key]])]
    differing = [f"{n}: {_said(x)} then, {_said(y)} now" for n, x, y in fields if x is not ... and x != y]
    return differing, [f"{name}={value}" for name, x, value in fields if x is ...]


def _said(value: Any) -> str:
    return "unknown" if value is ... else str(value)


def _same_file(then: RunRecord, now: RunRecord, name: str) -> Check:
    first, second = then.path / name, now.path / name
    if not first.exists():
        return Check(name, None, "not in the record")
    if first.read_bytes() == second.read_bytes():
        return Check(name, True, "the same byte for byte")
    if name == "matrix.csv":
        return Check(name, False, "differs")
    a, b = then.read_table(name.removesuffix(".parquet")), now.read_table(name.removesuffix(".parquet"))
    if a.equals(b):
        return Check(name, True, "every value is the same; the file was written by another version of pyarrow")
    if a.shape != b.shape:
        return Check(name, False, f"{len(a)} rows then, {len(b)} now")
    rows = int((a.astype(str) != b.astype(str)).any(axis=1).sum())
    return Check(name, False, f"{rows} of {len(a)} rows differ")


def environments(then: RunRecord, now: RunRecord) -> str:
    """What differs between the machines and packages of the two, the likely reason for another result."""
    a, b = then.read_env(), now.read_env()
    if not a:
        return "that of the record is not known"
    first, second = (entries[-1].model_dump(exclude={"started", "command", "notes"}) for entries in (a, b))
    found = [f"{key}: {first[key]} then, {second[key]} now" for key in first if first[key] != second[key]]
    return "; ".join(found) or "the same, as far as it is recorded"
