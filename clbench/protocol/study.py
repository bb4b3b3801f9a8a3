"""A study: all trials of one method on one scenario, and the choice that they lead to, frozen in a signed file.

    <out>/<tuning scenario>/<method>/<study id>/
        study.json     the frozen study: plan, trials, scores, seeds, fingerprints, code, best trial, signature
        jobs/          what came of each run (see `jobs`)
        trials/        the run records of the trials, as `clbench run` writes them
        evaluation/    files and run records of evaluations of the frozen choice (see `evaluation`)

While tuning nothing is known here but D_HT: no function below takes an evaluation scenario.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clbench.errors import InputError, RunFailed, unknown_name
from clbench.protocol.engines import Engine, Report
from clbench.protocol.jobs import Job, Outcome, record_of, summary_of
from clbench.protocol.pairs import Phase, open_phase
from clbench.protocol.search import Ask, SearchPlan, asks
from clbench.protocol.signed import read_signed, write_signed
from clbench.protocol.space import OPTIONS, Dimension, Space, declared_space, is_integer, split_values
from clbench.store.record import run_id

if TYPE_CHECKING:
    from clbench.methods.registry import FoundMethod

__all__ = ["Prepared", "StudyPlan", "check_study", "load_study", "prepare", "tune"]

VERSION = 1
WHERE = ("out", "data", "device", "threads", "weights", "checkpoint_every")  # how and where to run, not what
# scores that need no curve: trials are then not evaluated between task ends
OF_MATRIX = {
    "final_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer",
    "transfer", "avg", "last", "a_last",
}  # fmt: skip


@dataclass(frozen=True)
class StudyPlan:
    """What to study.

    method, scenario: id, alias or path. params: of the scenario. fixed: fields of `RunSpec` that every trial has
    (`set`, `batch_size`, `backbone` ...). where: fields that say how and where to run, see `WHERE`. overrides:
    dimensions that replace or extend what the method declares. seeds: of every trial: class order, and the run's own
    seed unless `run_seed` pins that. score: key of a metric. score_on: validation rows, `val_share` of each class, or
    D_HT's test
    rows (the official code's choice). untuned: a method without a search space is one trial.
    """

    method: str
    scenario: str
    search: SearchPlan
    seeds: tuple[int, ...] = (0, 1, 2)
    run_seed: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[Dimension, ...] = ()
    score: str = "final_accuracy"
    score_on: Literal["validation", "test"] = "validation"
    val_share: float = 0.1
    untuned: bool = False
    out: Path = Path("results/studies")


@dataclass(frozen=True)
class Prepared:
    """A plan with everything looked up. identity: what decides the study; its hash is the study's id."""

    plan: StudyPlan
    found: "FoundMethod"
    phase: Phase
    space: Space
    higher_is_better: bool
    identity: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.plan.out / self.phase.id / self.found.id / run_id(self.identity)

    @property
    def file(self) -> Path:
        return self.folder / "study.json"


# -- looking things up -----------------------------------------------------------------------------------------------
def prepare(plan: StudyPlan) -> Prepared:
    """Look everything up that a study needs, D_HT's tables included. Raises InputError for what can't be used."""
    from clbench.learner.resolve import check_setting
    from clbench.methods import registry
    from clbench.metrics import find_metric

    metric = find_metric(plan.score)
    found = registry.find(plan.method)
    if not plan.seeds:
        raise InputError("--tune-seeds is empty: a trial needs at least one seed")
    phase = open_phase(plan.scenario, tuning_params(plan), plan.seeds, plan.where.get("data", ()))
    check_setting(found, phase.any)
    space = search_space(plan, found, phase)
    search = plan.search
    if not len(space):
        if not plan.untuned:
            raise InputError(
                f"method {found.id} declares no search space on {phase.id}: give one by --space NAME=VALUES, or take "
                f"it as it is by --untuned"
            )
        search = replace(search, kind="uniform", trials=1)
    plan = replace(plan, search=search)
    identity = {
        "method": {"id": found.id, "file_sha256": found.digest or None},
        "tuned_on": {**phase.describe(), "score_on": plan.score_on,
                     "val_share": plan.val_share if plan.score_on == "validation" else None},
        "space": space.describe(),
        "fixed": plain(plan.fixed),
        "weights_sha256": file_digest(plan.where.get("weights")),
        "search": search.describe(),
        "seeds": list(plan.seeds),
        "run_seed": plan.run_seed,
        "score": plan.score,
    }  # fmt: skip
    make_job(plan, found, phase.id, dict(plan.fixed.get("set", {})), plan.seeds[0])  # are the fixed options of use?
    return Prepared(plan, found, phase, space, metric.higher_is_better, identity)


def tuning_params(plan: StudyPlan) -> dict[str, Any]:
    """Parameters of D_HT as trials see it."""
    params = dict(plan.params)
    if plan.score_on == "validation":
        params.setdefault("val_share", plan.val_share)
        params["score"] = "validation"
    return params


def search_space(plan: StudyPlan, found: "FoundMethod", phase: Phase) -> Space:
    """Declared dimensions, changed by the plan's, without what is fixed; every end of a range is a valid value."""
    from typing import get_type_hints

    from clbench.methods.config import make_config

    hints = get_type_hints(found.cls.Config)
    overrides = []
    for dimension in plan.overrides:
        if dimension.name not in hints and dimension.name not in OPTIONS:
            raise unknown_name(f"hyperparameter of method {found.id} to search", dimension.name, [*hints, *OPTIONS])
        if dimension.choices is None and (dimension.name in OPTIONS or is_integer(hints[dimension.name])):
            dimension = replace(dimension, integer=True)
        overrides.append(dimension)
    space = declared_space(found.cls.Config, found.path, phase.id, online=phase.any.online).with_(overrides)
    given = [name for name in OPTIONS if plan.fixed.get(name) is not None]
    space = space.without([*plan.fixed.get("set", {}), *given])
    for dimension in space.dimensions:
        ends = dimension.choices if dimension.choices is not None else (dimension.value(0.0), dimension.value(1.0))
        for value in ends:
            if dimension.name in OPTIONS:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise InputError(f"search space of {dimension.name}: {value} is not a whole number from 1 up")
            else:
                make_config(found.cls.Config, {"search space": {dimension.name: value}}, f"method {found.id}")
    if phase.any.online and "epochs" in space.names:
        raise InputError(f"scenario {phase.id} is online: its samples come once; leave epochs out of the search space")
    return space


def make_job(
    plan: StudyPlan, found: "FoundMethod", scenario_id: str, values: Mapping[str, Any], seed: int,
    first_tasks: int | None = None,
) -> Job:  # fmt: skip
    """The job of one trial and one seed."""
    hyperparameters, options = split_values(values)
    params = tuning_params(plan)
    if first_tasks is not None:
        params["first_tasks"] = first_tasks
    fixed = dict(plan.fixed)
    if fixed.get("eval_every") is None and plan.score in OF_MATRIX:
        fixed["eval_every"] = 0
    spec = {
        **fixed, **options,
        "method": str(found.path.resolve()) if found.digest and found.path else found.id,
        "scenario": full_path(plan.scenario),
        "seed": seed if plan.run_seed is None else plan.run_seed,
        "order_seed": seed,
        "set": {**fixed.get("set", {}), **hyperparameters},
        "scenario_params": params,
    }  # fmt: skip
    source = f"search on {scenario_id}"
    return Job(checked(spec), plan.where, dict.fromkeys(hyperparameters, source), dict.fromkeys(options, source))


def checked(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a RunSpec as plain values, without those that say where to run. Raises InputError."""
    from pydantic import ValidationError

    from clbench.learner.spec import RunSpec

    try:
        return RunSpec.model_validate(spec).model_dump(mode="json", exclude=set(WHERE))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        reason = first["msg"].removeprefix("Input should be ")
        raise InputError(f"--{name} is {first['input']!r}, it should be {reason}") from None


def full_path(name: str) -> str:
    """A file's absolute path, as workers may have another working folder; a name as it is."""
    return str(Path(name).expanduser().resolve()) if name.endswith(".py") else name


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items() if v is not None and v != {}}


def file_digest(path: Any) -> str | None:
    if path is None:
        return None
    try:
        return sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"--weights {path} cannot be read: {error.strerror}") from None


# -- tuning ----------------------------------------------------------------------------------------------------------
def tune(prepared: Prepared, engine: Engine, report: Report | None = None) -> dict[str, Any]:
    """Run the trials, choose, and freeze the choice in `study.json`; returns its content.

    A frozen study is shown, an unfinished one goes on. Raises RunFailed if no trial survives, and what the engine
    raises: then nothing is frozen, and what is finished is kept.
    """
    if prepared.file.exists():
        return load_study(prepared.file)
    plan, folder = prepared.plan, prepared.folder
    plan = replace(plan, where={**plan.where, "out": str(folder.absolute() / "trials")})
    entries: dict[int, dict[str, Any]] = {}
    used: dict[str, tuple[Job, Outcome]] = {}
    search = asks(plan.search, prepared.space, plan.seeds, len(prepared.phase.any.tasks))
    answer: dict[int, float | None] | None = None
    while True:
        try:
            wanted = search.send(answer) if answer is not None else next(search)
        except StopIteration:
            break
        jobs = {(ask.trial, seed): job_of(plan, prepared, ask, seed) for ask in wanted for seed in ask.seeds}
        outcomes = engine.run(list(jobs.values()), folder / "jobs", report)
        answer = {}
        for ask in wanted:
            own = {seed: (jobs[ask.trial, seed], outcomes[jobs[ask.trial, seed].key]) for seed in ask.seeds}
            used |= {job.key: (job, outcome) for job, outcome in own.values()}
            entry = trial_entry(ask, own, plan.score)
            answer[ask.trial] = None if entry["score"] is None else (
                entry["score"] if prepared.higher_is_better else -entry["score"]
            )  # fmt: skip
            entries[ask.trial] = with_history(entries.get(ask.trial), entry)
    trials = [entries[number] for number in sorted(entries)]
    best = choose(trials, plan, prepared)
    job, outcome = used[job_of(plan, prepared, Ask(best["trial"], best["values"], plan.seeds), plan.seeds[0]).key]
    done = [pair for pair in used.values() if pair[1].status == "done"]
    content = {
        "kind": "study",
        "version": VERSION,
        "study": folder.name,
        **prepared.identity,
        "trials": trials,
        "best": {"trial": best["trial"], "values": best["values"], "score": best["score"],
                 "frozen": frozen(job, outcome)},
        "code": code_of(done),
        "device_types": sorted({record_of(*pair).read_spec().device_type for pair in done}),
    }  # fmt: skip
    return write_signed(prepared.file, content)


def job_of(plan: StudyPlan, prepared: Prepared, ask: Ask, seed: int) -> Job:
    job = make_job(plan, prepared.found, prepared.phase.id, ask.values, seed, ask.first_tasks)
    part = "" if ask.first_tasks is None else f" (first {ask.first_tasks} tasks)"
    return replace(job, label=f"{prepared.found.id} on {prepared.phase.id}, trial {ask.trial}, seed {seed}{part}")


def trial_entry(ask: Ask, own: Mapping[int, tuple[Job, Outcome]], score: str) -> dict[str, Any]:
    """What a study file says of a trial. A trial fails if one of its seeds does, with the reason of the first."""
    scores: dict[str, float] = {}
    reason = ""
    for seed, (job, outcome) in own.items():
        if outcome.status == "failed":
            reason = reason or f"seed {seed}: {outcome.reason}"
            continue
        value = summary_of(job, outcome).get(score)
        if value is None:
            reason = reason or f"seed {seed}: {score} is not defined for this run"
        else:
            scores[str(seed)] = value
    return {
        "trial": ask.trial,
        "values": dict(ask.values),
        "status": "failed" if reason else "done",
        "reason": reason,
        "score": None if reason else sum(scores.values()) / len(scores),
        "scores": scores,
        "first_tasks": ask.first_tasks,
        "runs": {str(seed): outcome.path for seed, (_, outcome) in own.items() if outcome.status == "done"},
    }


def with_history(earlier: dict[str, Any] | None, entry: dict[str, Any]) -> dict[str, Any]:
    """A trial that got further: its latest rung, with the earlier ones behind it."""
    if earlier is None:
        return entry
    shown = {key: earlier[key] for key in ("first_tasks", "scores", "score", "runs")}
    return {**entry, "earlier": [*earlier.get("earlier", []), shown]}


def choose(trials: Sequence[dict[str, Any]], plan: StudyPlan, prepared: Prepared) -> dict[str, Any]:
    """The best trial that ran in full; of equals the first."""
    wanted = [str(seed) for seed in plan.seeds]
    full = [t for t in trials if t["status"] == "done" and t["first_tasks"] is None and list(t["scores"]) == wanted]
    if not full:
        failed = [t for t in trials if t["reason"]]
        first = f"; trial {failed[0]['trial']}: {failed[0]['reason']}" if failed else ""
        raise RunFailed(
            f"all {len(trials)} trials of {prepared.found.id} on {prepared.phase.id} failed{first}; narrow the search "
            f"space by --space"
        )
    sign = 1 if prepared.higher_is_better else -1
    return max(full, key=lambda t: (sign * t["score"], -t["trial"]))


def frozen(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Every hyperparameter and run option of the chosen trial, with its source: what evaluation runs with."""
    spec = record_of(job, outcome).read_spec()
    names = ("batch_size", "epochs", "updates_per_batch", "mask", "backbone", "backbone_options")
    return {
        "hyperparameters": {name: entry.model_dump() for name, entry in spec.hyperparameters.items()},
        "options": {
            name: {"value": getattr(spec, name), "source": spec.sources.get(name, "default")} for name in names
        },
        "backbone_fingerprint": spec.backbone_fingerprint,
    }


def code_of(done: Sequence[tuple[Job, Outcome]]) -> list[dict[str, Any]]:
    """Versions of the code that ran: one, unless it changed in the middle."""
    found = set()
    for job, outcome in done:
        for entry in record_of(job, outcome).read_env()[-1:]:
            found.add((entry.clbench, entry.commit, entry.dirty, entry.torch))
    ordered = sorted(found, key=str)
    return [dict(zip(("clbench", "commit", "dirty", "torch"), entry, strict=True)) for entry in ordered]


# -- a frozen study --------------------------------------------------------------------------------------------------
def load_study(path: Path) -> dict[str, Any]:
    """Read a study file. Raises InputError if it is missing, damaged, or has been changed."""
    content = read_signed(path, "study")
    if content["version"] > VERSION:
        raise InputError(f"{path} has version {content['version']}; this needs a newer clbench")
    return content


def check_study(study: Mapping[str, Any], path: Path, scenario: str | None, data: Sequence[Path]) -> Phase:
    """Rebuild D_HT and refuse a study that was made on other tables or data. Returns D_HT, opened.

    scenario: path of a user's scenario file; None for the id in the study.
    """
    tuned = study["tuned_on"]
    phase = open_phase(scenario or tuned["scenario"], tuned["params"], study["seeds"], data)
    for what, now in phase.describe().items():
        if now != tuned[what]:
            raise InputError(
                f"{path} was tuned on {tuned['scenario']} with other {what.replace('_', ' ')} than it has here: its "
                f"choice does not hold for these data or this version; run the study again"
            )
    return phase


def check_method(study: Mapping[str, Any], path: Path, found: "FoundMethod") -> None:
    """Refuse a method that is not the one of the study."""
    known = study["method"]
    if (found.id, found.digest or None) != (known["id"], known["file_sha256"]):
        raise InputError(f"{path} is a study of another method, or {found.id} has changed since; run the study again")
