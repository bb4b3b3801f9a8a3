"""The commands `clbench protocol run`, `clbench protocol show` and `clbench sweep`. Parse, call one function, print."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.errors import InputError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clbench.protocol.engines import Engine
    from clbench.protocol.jobs import Job, Outcome
    from clbench.protocol.space import Dimension
    from clbench.protocol.two_phase import MethodResult

__all__ = ["protocol_app", "sweep"]

MAX_SEEDS = 1000
STUDIES = Path("results/studies")

protocol_app = typer.Typer(
    help="Two-phase hyperparameter protocol: tune on one scenario, freeze, score on another.", no_args_is_help=True
)

Methods = Annotated[
    list[str] | None, typer.Option("--method", help="Methods: ids or paths, commas between (repeatable).")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="[METHOD.]KEY=VALUE", help="Fix a hyperparameter, of one method or all (repeatable)."
    ),
]
ScenarioSets = Annotated[
    list[str] | None,
    typer.Option("--scenario-set", metavar="KEY=VALUE", help="Parameter of the scenarios (repeatable)."),
]
Backbone = Annotated[str | None, typer.Option(help="Built-in backbone or full timm name.")]
BackboneSets = Annotated[
    list[str] | None, typer.Option("--backbone-set", metavar="KEY=VALUE", help="Option of the backbone (repeatable).")
]
Weights = Annotated[Path | None, typer.Option(metavar="FILE", help="Backbone weights.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="Rows per step, for all runs; not searched then.")]
Epochs = Annotated[int | None, typer.Option(metavar="N", help="Passes per task, for all runs; not searched then.")]
View = Annotated[str | None, typer.Option(metavar="VIEW", help="Pipeline for the images.")]
EvalEvery = Annotated[int | None, typer.Option(metavar="N", help="Steps between evaluations of the curve.")]
EvalPerGroup = Annotated[int | None, typer.Option(metavar="N", help="Test images of each group per evaluation.")]
Threads = Annotated[int, typer.Option(metavar="N", help="CPU threads of a run; results can depend on it.")]
CheckpointEvery = Annotated[int | None, typer.Option(metavar="N", help="Steps between checkpoints.")]
Data = Annotated[
    list[Path] | None, typer.Option("--data", metavar="DIR", help="Folder searched for data (repeatable).")
]
Allow = Annotated[
    bool, typer.Option("--allow-contamination", help="Run a backbone pretrained on the images; marks the records.")
]
EngineOption = Annotated[str, typer.Option("--engine", help="in-process, or ray.")]
Address = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Ray cluster (`auto`, HOST:PORT); this machine if not given."),
]
Cpus = Annotated[float, typer.Option("--cpus-per-trial", metavar="N", help="Ray: CPUs that a run takes.")]
Gpus = Annotated[
    float, typer.Option("--gpus-per-trial", metavar="N", help="Ray: share of a GPU that a run takes; 0.25 stacks four.")
]
Retries = Annotated[
    int, typer.Option(metavar="N", help="Ray: tries of a run after its worker died or ran out of memory.")
]
Track = Annotated[
    str | None, typer.Option(metavar="URI", help="Log to MLflow when all is done, e.g. sqlite:///mlflow.db.")
]


@protocol_app.command("run")
def run(
    method: Methods = None,
    tune: Annotated[str | None, typer.Option(help="Scenario to tune on (D_HT).")] = None,
    eval_: Annotated[str | None, typer.Option("--eval", help="Scenario to evaluate on (D_E).")] = None,
    trials: Annotated[int, typer.Option(metavar="R", help="Trials of each method.")] = 30,
    seeds: Annotated[str, typer.Option(help='Evaluation seeds: how many ("5"), or which ("0-4", "1993,1996").')] = "5",
    tune_seeds: Annotated[str, typer.Option(help="Seeds of each trial, as --seeds.")] = "3",
    run_seed: Annotated[
        int | None, typer.Option(metavar="N", help="Vary the class order only: pin the runs' seed.")
    ] = None,
    search: Annotated[str, typer.Option(help="How trials are drawn: uniform, quasi, tpe or halving.")] = "uniform",
    search_seed: Annotated[int, typer.Option(metavar="N", help="Seed of the draws, the same for all methods.")] = 0,
    tpe_batch: Annotated[int, typer.Option(metavar="N", help="tpe: trials drawn before scores are looked at.")] = 4,
    eta: Annotated[int, typer.Option(metavar="N", help="halving: each rung keeps one trial in N.")] = 3,
    first_tasks: Annotated[int, typer.Option(metavar="K", help="halving: tasks of the first rung.")] = 3,
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space",
            metavar="[METHOD.]NAME=VALUES",
            help="Search 0.01,0.1 or log(1e-4,0.1), linear(0,1), int(1,8) (repeatable).",
        ),
    ] = None,
    untuned: Annotated[bool, typer.Option("--untuned", help="Take a method without a search space as it is.")] = False,
    score: Annotated[str, typer.Option(metavar="METRIC", help="Metric to choose by.")] = "final_accuracy",
    score_on: Annotated[str, typer.Option(help="Rows that trials are scored on: validation, or test.")] = "validation",
    val_share: Annotated[float, typer.Option(help="Share of D_HT's training rows kept for validation.")] = 0.1,
    in_scenario: Annotated[
        bool, typer.Option("--in-scenario", help="Allow D_E to share classes or images with D_HT; marks the results.")
    ] = False,
    conventional: Annotated[
        bool, typer.Option("--conventional", help="Also tune on D_E by its test rows, to show the overestimate.")
    ] = False,
    study: Annotated[
        list[Path] | None, typer.Option("--study", metavar="FILE", help="Evaluate a frozen study; nothing is tuned.")
    ] = None,
    set_: Sets = None,
    scenario_set: ScenarioSets = None,
    tune_set: Annotated[
        list[str] | None, typer.Option("--tune-set", metavar="KEY=VALUE", help="Parameter of D_HT only (repeatable).")
    ] = None,
    eval_set: Annotated[
        list[str] | None, typer.Option("--eval-set", metavar="KEY=VALUE", help="Parameter of D_E only (repeatable).")
    ] = None,
    backbone: Backbone = None,
    backbone_set: BackboneSets = None,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    train_view: View = None,
    test_view: View = None,
    eval_every: EvalEvery = None,
    eval_per_group: EvalPerGroup = None,
    threads: Threads = 1,
    checkpoint_every: CheckpointEvery = None,
    data: Data = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the studies.")] = STUDIES,
    allow_contamination: Allow = False,
    engine: EngineOption = "in-process",
    address: Address = None,
    cpus_per_trial: Cpus = 1.0,
    gpus_per_trial: Gpus = 0.0,
    retries: Retries = 3,
    track: Track = None,
) -> None:
    """Choose hyperparameters on one scenario, freeze them, score them on another.

    The same command again shows what is done and goes on with the rest, after whatever was killed.
    """
    from clbench.protocol.two_phase import Target, evaluate_frozen, run_protocol, write_report

    where = where_of(data, device, threads, weights, checkpoint_every)
    shared = pairs("--scenario-set", scenario_set)
    target = None
    if eval_ is not None:
        target = Target(eval_, seed_list("--seeds", seeds), shared | pairs("--eval-set", eval_set), in_scenario)
    with engine_of(engine, address, cpus_per_trial, gpus_per_trial, retries) as runner:
        if study:
            if target is None or method or tune:
                raise InputError("--study evaluates frozen studies: give --eval, and neither --method nor --tune")
            results = evaluate_frozen(study, target, runner, where, teller())
        else:
            plans = plans_of(
                methods=names("--method", method), tune=tune, params=shared | pairs("--tune-set", tune_set),
                search={"kind": search, "trials": trials, "seed": search_seed, "batch": tpe_batch, "eta": eta,
                        "first_tasks": first_tasks},
                sets=set_, spaces=space, where=where, out=out, untuned=untuned, run_seed=run_seed,
                seeds=seed_list("--tune-seeds", tune_seeds), score=score, score_on=score_on, val_share=val_share,
                fixed={"backbone": backbone, "backbone_options": pairs("--backbone-set", backbone_set),
                       "precision": precision, "batch_size": batch_size, "epochs": epochs, "train_view": train_view,
                       "test_view": test_view, "eval_every": eval_every, "eval_per_group": eval_per_group,
                       "allow_contamination": allow_contamination},
            )  # fmt: skip
            if conventional and target is None:
                raise InputError("--conventional compares on the evaluation scenario: give --eval")
            results = run_protocol(plans, target, runner, conventional=conventional, report=teller())
    page = write_report(results, out / report_name(results))
    print_results(results, page)
    if track is not None:
        from clbench.protocol.track import log_results

        log_results(results, track)


def plans_of(
    *, methods: Sequence[str], tune: str | None, search: Mapping[str, Any], sets: list[str] | None,
    spaces: list[str] | None, fixed: Mapping[str, Any], **others: Any,
) -> list[Any]:  # fmt: skip
    """One StudyPlan per method."""
    from clbench.protocol.search import KINDS, SearchPlan
    from clbench.protocol.space import parse_dimension
    from clbench.protocol.study import StudyPlan

    if tune is None:
        raise InputError(
            "--tune is missing: name the scenario to tune on, or evaluate a frozen study with --study FILE"
        )
    if search["kind"] not in KINDS:
        raise unknown_name("search", search["kind"], KINDS)
    if others["score_on"] not in ("validation", "test"):
        raise unknown_name("value of --score-on", others["score_on"], ("validation", "test"))
    if not 0 < others["val_share"] < 1:
        raise InputError(f"--val-share is {others['val_share']}, it must be between 0 and 1")
    set_of, space_of = scoped("--set", sets, methods), scoped("--space", spaces, methods)
    kept = {name: value for name, value in fixed.items() if value is not None and value is not False and value != {}}

    def dimensions(method: str) -> "tuple[Dimension, ...]":
        return tuple(parse_dimension(name, text) for name, text in space_of[method].items())

    return [
        StudyPlan(
            method=method, scenario=tune, search=SearchPlan(**search), overrides=dimensions(method),
            fixed={**kept, "set": set_of[method]}, **others,
        )
        for method in methods
    ]  # fmt: skip


@protocol_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="study.json, an evaluation's file, or the folder of a study.")],
    records: Annotated[bool, typer.Option("--records", help="Compare with the run records too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """What a study or an evaluation says; a changed file is refused."""
    from clbench.protocol import tables
    from clbench.protocol.evaluation import load_evaluation
    from clbench.protocol.study import load_study
    from clbench.protocol.verify import against_records

    path = file / "study.json" if file.is_dir() else file
    content = load_evaluation(path) if path.parent.name == "evaluation" else load_study(path)
    if as_json:
        print(json.dumps(content, indent=2))
    elif content["kind"] == "evaluation":
        mark = ", IN-SCENARIO" if content["in_scenario"] else ""
        print(
            f"{content['method']['id']} on {content['evaluated_on']['scenario']}, tuned on {content['tuned_on']}{mark}"
        )
        print(f"values {content['values']}, study {content['study']}\n")
        print(tables.plain_text(tables.evaluation_rows(content)))
    else:
        print(f"{content['method']['id']} on {content['tuned_on']['scenario']}, study {content['study']}")
        print(f"signature {content['signature']}\nscored on {content['tuned_on']['score_on']} rows\n")
        parts = [tables.trial_rows(content), tables.influence_rows(content), tables.curve_rows(content)]
        print("\n\n".join(tables.plain_text(rows) for rows in parts if rows))
    if records:
        problems = against_records(path, content)
        print("\n" + ("\n".join(problems) if problems else "the run records say the same"))
        raise typer.Exit(1 if problems else 0)


def sweep(
    method: Methods = None,
    scenario: Annotated[list[str] | None, typer.Option(help="Scenarios, commas between (repeatable).")] = None,
    seeds: Annotated[str, typer.Option(help='Seeds: how many ("5"), or which ("0-4", "1993,1996").')] = "1",
    set_: Sets = None,
    scenario_set: ScenarioSets = None,
    backbone: Backbone = None,
    backbone_set: BackboneSets = None,
    weights: Weights = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = None,
    epochs: Epochs = None,
    train_view: View = None,
    test_view: View = None,
    eval_every: EvalEvery = None,
    eval_per_group: EvalPerGroup = None,
    threads: Threads = 1,
    checkpoint_every: CheckpointEvery = None,
    data: Data = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for run records.")] = Path("results/runs"),
    allow_contamination: Allow = False,
    engine: EngineOption = "in-process",
    address: Address = None,
    cpus_per_trial: Cpus = 1.0,
    gpus_per_trial: Gpus = 0.0,
    retries: Retries = 3,
) -> None:
    """Run a grid of methods x scenarios x seeds, here or on a Ray cluster; the same command again goes on."""
    from clbench.protocol import tables
    from clbench.protocol.sweep import sweep as run_grid
    from clbench.protocol.sweep import sweep_rows

    methods = names("--method", method)
    fixed = {
        "scenario_params": pairs("--scenario-set", scenario_set), "backbone": backbone,
        "backbone_options": pairs("--backbone-set", backbone_set), "precision": precision, "batch_size": batch_size,
        "epochs": epochs, "train_view": train_view, "test_view": test_view, "eval_every": eval_every,
        "eval_per_group": eval_per_group, "allow_contamination": allow_contamination,
    }  # fmt: skip
    set_of = scoped("--set", set_, methods)
    with engine_of(engine, address, cpus_per_trial, gpus_per_trial, retries) as runner:
        cells = run_grid(
            methods, names("--scenario", scenario), seed_list("--seeds", seeds), runner,
            fixed={name: {**fixed, "set": set_of[name]} for name in methods},
            where=where_of(data, device, threads, weights, checkpoint_every), out=out, report=teller(),
        )  # fmt: skip
    print(tables.plain_text(sweep_rows(cells)))
    print(f"\nrecords {out}")
    failed = any(o.status == "failed" for cell in cells for _, o in cell.outcomes.values())
    raise typer.Exit(1 if failed else 0)


# -- reading options -------------------------------------------------------------------------------------------------
def names(option: str, given: list[str] | None) -> list[str]:
    """`["a,b", "c"]` -> a, b, c, each once. Raises InputError if there is none."""
    found = [part.strip() for text in given or () for part in text.split(",") if part.strip()]
    if not found:
        raise InputError(f"{option} is missing: name at least one")
    return list(dict.fromkeys(found))


def seed_list(option: str, text: str) -> tuple[int, ...]:
    """`"5"`: the five seeds 0 to 4. `"0-4"`, `"1993,1996"`: those.

    >>> seed_list("--seeds", "3"), seed_list("--seeds", "7,1-2")
    ((0, 1, 2), (7, 1, 2))
    """
    found: dict[int, None] = {}
    if text.isascii() and text.isdigit():
        if not 0 < int(text) <= MAX_SEEDS:
            raise InputError(
                f"{option} is {text}: give a number of seeds from 1 to {MAX_SEEDS}, or a list like 0-4 or 7,8"
            )
        return tuple(range(int(text)))
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = [first, last] if dash else [first]
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise InputError(f'{option} is {text!r}, write how many ("5") or which ("0-4", "1993,1996")')
        low, high = int(first), int(last if dash else first)
        if not low <= high < low + MAX_SEEDS:
            raise InputError(f"{option} has the range {part.strip()!r}, it must go up, by less than {MAX_SEEDS}")
        found |= dict.fromkeys(range(low, high + 1))
    return tuple(found)


def pairs(option: str, given: Sequence[str] | None) -> dict[str, str]:
    """`["a=1"]` -> {"a": "1"}."""
    out: dict[str, str] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{option} {text!r} is not of the form key=value")
        if key.strip() in out:
            raise InputError(f"{option} gives {key.strip()!r} twice; leave one of them out")
        out[key.strip()] = value.strip()
    return out


def scoped(option: str, given: Sequence[str] | None, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Per method: what `METHOD.KEY=VALUE` gives to it, over what `KEY=VALUE` gives to all. METHOD is its name as given,
    or a file's name without folder and ending."""
    known = {Path(name).stem if name.endswith(".py") else name: name for name in methods}
    out: dict[str, dict[str, str]] = {name: {} for name in methods}
    own: dict[str, dict[str, str]] = {name: {} for name in methods}
    for key, value in pairs(option, given).items():
        method, dot, name = key.rpartition(".")
        if not dot:
            for each in out.values():
                each[key] = value
        elif method in known:
            own[known[method]][name] = value
        else:
            raise unknown_name(f"method in {option} {key}={value}", method, known)
    return {name: {**out[name], **own[name]} for name in methods}


def where_of(
    data: list[Path] | None, device: str, threads: int, weights: Path | None, checkpoint_every: int | None
) -> dict[str, Any]:
    """How and where runs run; absolute, as workers may have another working folder."""
    return {
        "data": [str(path.expanduser().resolve()) for path in data or ()],
        "device": device,
        "threads": threads,
        "weights": None if weights is None else str(weights.expanduser().resolve()),
        "checkpoint_every": checkpoint_every,
    }


@contextmanager
def engine_of(name: str, address: str | None, cpus: float, gpus: float, retries: int) -> "Iterator[Engine]":
    """The engine by its name."""
    from clbench.protocol.engines import InProcess, Ray

    if name == "ray":
        if cpus < 0 or gpus < 0 or retries < 0 or cpus + gpus == 0:
            raise InputError(
                "--cpus-per-trial, --gpus-per-trial and --retries cannot be negative, and a trial takes some"
            )
        ray = Ray(address, cpus, gpus, retries)
        try:
            yield ray
        finally:
            with suppress(Exception):
                ray.close()
        return
    if name != "in-process":
        raise unknown_name("engine", name, ("in-process", "ray"))
    if address is not None:
        raise InputError("--address is of a Ray cluster: add --engine ray")
    yield InProcess()


# -- showing ---------------------------------------------------------------------------------------------------------
def teller() -> "Callable[[int, int, Job, Outcome], None]":
    """A line on stderr for each run that ends, with the time left at this rate."""
    begin, first = time.monotonic(), -1

    def tell(finished: int, total: int, job: "Job", outcome: "Outcome") -> None:
        nonlocal begin, first
        now = time.monotonic()
        if first < 0 or finished <= first:  # a new list of jobs
            first = finished - 1
        rate = (now - begin) / max(finished - first, 1)
        left = f", about {rate * (total - finished):.0f} s left" if finished < total else ""
        if finished == total:
            begin, first = now, -1
        what = "done" if outcome.status == "done" else f"failed: {outcome.reason}"
        print(f"[{finished}/{total}{left}] {job.label}: {what}", file=sys.stderr, flush=True)

    return tell


def report_name(results: "Sequence[MethodResult]") -> str:
    """`<D_HT>--<D_E>`, or `<D_HT>` where nothing was evaluated."""
    first = results[0]
    tuned = first.study["tuned_on"]["scenario"]
    return f"{tuned}--{first.evaluation['evaluated_on']['scenario']}" if first.evaluation else str(tuned)


def print_results(results: "Sequence[MethodResult]", page: Path) -> None:
    from clbench.protocol.tables import plain_text
    from clbench.protocol.two_phase import notes, rows_of

    print(plain_text(rows_of(results)) + "\n")
    for note in notes(results):
        print(note)
    print()
    for result in results:
        print(f"study   {result.folder / 'study.json'}")
    print(f"report  {page}")
