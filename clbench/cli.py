"""The command line: parse, call one function, print.

Everything heavy is imported inside the command that needs it, so that `--help` and `list` answer at once. Errors that a
user can cause end as one sentence on stderr. Exit codes: 0 done, 1 failed while running, 2 bad usage or input, 130
interrupted.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from clbench.errors import ClbenchError, InputError, unknown_name

__all__ = ["app", "main"]

RUNS = Path("results/runs")

app = typer.Typer(
    name="clbench",
    help="Continual-learning benchmark suite: run a method on a scenario, watch every iteration, compare results.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Which data sets are found, and how to get the others.", no_args_is_help=True)
app.add_typer(data_app, name="data")

DataOption = Annotated[
    list[Path] | None, typer.Option("--data", metavar="DIR", help="Folder searched for data first (repeatable).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
ScenarioSetOption = Annotated[
    list[str] | None,
    typer.Option("--scenario-set", metavar="KEY=VALUE", help="Parameter of the scenario (repeatable), dataset included."),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return the exit code."""
    try:
        code = app(args=argv, prog_name="clbench", standalone_mode=False)
    except ClbenchError as error:
        return complain(str(error), error.exit_code)
    except typer.TyperException as error:  # wrong usage: unknown option, missing value
        message = error.format_message().strip()
        return complain(message[0].lower() + message[1:].rstrip("."), 2) if message else 2
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has gone (`clbench list runs | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import clbench

        print(f"clbench {clbench.__version__}")
        raise typer.Exit


# -- run ---------------------------------------------------------------------------------------------------------


@app.command()
def run(
    method: Annotated[str, typer.Option(help="Method id, alias, or path of a Python file that defines METHOD.")],
    scenario: Annotated[str, typer.Option(help="Scenario id (`split-digits`, `split-cifar100@1`) or path of a file.")],
    seeds: Annotated[str, typer.Option(help='Seeds, one run each: "0", "0-4", "0-2,7".')] = "0",
    order_seed: Annotated[
        int | None, typer.Option(help="Seed of class and stream order; the run's own seed if not given.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Hyperparameter of the method (repeatable).")
    ] = None,
    scenario_set: ScenarioSetOption = None,
    backbone: Annotated[str | None, typer.Option(help="Built-in backbone or full timm name.")] = None,
    backbone_set: Annotated[
        list[str] | None, typer.Option("--backbone-set", metavar="KEY=VALUE", help="Option of the backbone (repeatable).")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Backbone weights, safetensors or torch state dict.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    mask: Annotated[
        str | None, typer.Option(help="What answers are taken over: seen, all or task; the method's if not given.")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between evaluations, 0 for none; the scenario's if not given.")
    ] = None,
    eval_per_group: Annotated[
        int | None, typer.Option(metavar="N", help="Test images of each group per evaluation of the curve.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Rows of the stream per step.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes per task; not for online scenarios.")] = None,
    train_view: Annotated[
        str | None, typer.Option(metavar="VIEW", help='Pipeline for training images, e.g. "pad_crop(4) flip".')
    ] = None,
    test_view: Annotated[
        str | None, typer.Option(metavar="VIEW", help='Pipeline for test images, e.g. "normalize(cifar100)".')
    ] = None,
    data: DataOption = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for run records.")] = RUNS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew beside a run of the same specification.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look everything up, estimate time, memory and disk, train nothing.")
    ] = False,
    allow_contamination: Annotated[
        bool,
        typer.Option("--allow-contamination", help="Run a backbone pretrained on the scenario's images; marks the record."),
    ] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between checkpoints; once a minute if not given.")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; torch's default if not given.")] = None,
    keep_weights: Annotated[bool, typer.Option("--keep-weights", help="Keep the final weights in the record.")] = False,
    keep_checkpoint: Annotated[
        bool, typer.Option("--keep-checkpoint", help="Keep the last checkpoint of a finished run.")
    ] = False,
) -> None:
    """Run a method on a scenario, for one or several seeds.

    The same command again shows a finished run and goes on with an unfinished one.
    """
    options = {
        "order_seed": order_seed,
        "set": parse_pairs("--set", set_),
        "scenario_params": parse_pairs("--scenario-set", scenario_set),
        "backbone": backbone,
        "backbone_options": parse_pairs("--backbone-set", backbone_set),
        "weights": weights,
        "device": device,
        "precision": precision,
        "mask": mask,
        "eval_every": eval_every,
        "eval_per_group": eval_per_group,
        "batch_size": batch_size,
        "epochs": epochs,
        "train_view": train_view,
        "test_view": test_view,
        "data": tuple(data or ()),
        "out": out,
        "allow_contamination": allow_contamination,
        "checkpoint_every": checkpoint_every,
        "threads": threads,
        "keep_weights": keep_weights,
        "keep_checkpoint": keep_checkpoint,
    }
    from clbench import api

    if dry_run:
        raise NotImplementedError
    results = api.run(method, scenario, seeds, fresh=fresh, progress=True, **options)


def parse_pairs(option: str, pairs: Sequence[str] | None) -> dict[str, str]:
    """`["a=1", "b=x=y"]` -> `{"a": "1", "b": "x=y"}`; types are up to whoever declared the names."""
    out: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InputError(f"{option} {pair!r} is not of the form key=value")
        if key.strip() in out:
            raise InputError(f"{option} gives {key.strip()!r} twice; leave one of them out")
        out[key.strip()] = value.strip()
    return out


# -- list --------------------------------------------------------------------------------------------------------


def rows_of_methods(_: Path) -> list[dict[str, Any]]:
    from clbench.methods.registry import list_methods

    return list_methods()


def rows_of_scenarios(_: Path) -> list[dict[str, Any]]:
    from clbench.scenarios.registry import list_scenarios

    return list_scenarios()


def rows_of_datasets(_: Path) -> list[dict[str, Any]]:
    from clbench.data.catalogue import list_datasets

    return list_datasets()


def rows_of_backbones(_: Path) -> list[dict[str, Any]]:
    from clbench.backbones import list_backbones

    return list_backbones()


def rows_of_metrics(_: Path) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from clbench.metrics.registry import list_metrics

    return [asdict(metric) for metric in list_metrics()]


def rows_of_runs(runs: Path) -> list[dict[str, Any]]:
    from clbench.store.scan import find_runs

    if runs == RUNS and not runs.exists():  # nothing has been run here yet
        return []
    return [found.as_row() for found in find_runs(runs)]


# what can be listed: where its rows come from, and the columns shown on a screen (--json has all of them)
LISTINGS: Mapping[str, tuple[Callable[[Path], list[dict[str, Any]]], tuple[str, ...]]] = {
    "methods": (rows_of_methods, ("id", "title", "settings", "aliases")),
    "scenarios": (rows_of_scenarios, ("id", "title", "datasets")),
    "datasets": (rows_of_datasets, ("name", "title", "classes", "shape", "train_rows", "test_rows")),
    "backbones": (rows_of_backbones, ("name", "title")),
    "metrics": (rows_of_metrics, ("key", "title", "unit", "formula")),
    "runs": (rows_of_runs, ("scenario", "method", "seed", "state", "final_accuracy", "path")),
}


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(metavar="|".join(LISTINGS))],
    as_json: JsonOption = False,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder of run records, for `list runs`.")] = RUNS,
) -> None:
    """What there is: methods, scenarios, data sets, backbones, metrics, finished and unfinished runs."""
    if what not in LISTINGS:
        raise unknown_name("listing", what, LISTINGS)
    rows_of, columns = LISTINGS[what]
    rows = rows_of(runs)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(columns, rows)
    else:
        print(f"no {what} in {runs}")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A plain table: wrapped to a terminal's width, one line per row where it goes to a file or a pipe."""
    titles = [column.replace("_", " ") for column in columns]
    lines = [[cell(row.get(column)) for column in columns] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for index, title in enumerate(titles):
            table.add_column(title, no_wrap=index == 0, overflow="fold")
        for line in lines:
            table.add_row(*line)
        Console(markup=False, highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    for line in [titles, *lines]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)


# -- show --------------------------------------------------------------------------------------------------------


@app.command()
def show(
    scenario: Annotated[str, typer.Argument(help="Scenario id or path of a scenario file.")],
    scenario_set: ScenarioSetOption = None,
    order_seed: Annotated[int, typer.Option(help="Seed of class and stream order.")] = 0,
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where the picture goes; results/scenarios/<id>.png if not given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The task table of a scenario, and a picture of its stream."""
    from clbench.data import load
    from clbench.report.stream_picture import draw
    from clbench.scenarios import registry
    from clbench.scenarios.describe import describe

    preset = registry.find(scenario).with_params(parse_pairs("--scenario-set", scenario_set))
    tables = [load(name, roots=tuple(data or ())).table() for name in preset.datasets]
    built = registry.build(preset, tables, order_seed)
    rows = describe(built)
    picture = draw(built, out or Path("results/scenarios") / f"{built.id}.png")
    if as_json:
        about = {"id": built.id, "title": preset.title, "setting": built.setting, "online": built.online,
                 "num_classes": built.num_classes, "fingerprint": built.fingerprint, "parameters": preset.param_table(),
                 "tasks": rows, "picture": picture}  # fmt: skip
        print_json(about)
        return
    print(f"{built.id}: {preset.title}")
    print(f"source: {preset.source}")
    once = "every row once, in order" if built.online else "epochs, reshuffled"
    print(f"{built.setting}-incremental, {once}, {built.num_classes} classes, order seed {order_seed}")
    print(f"fingerprint {built.fingerprint}\n")
    print_table(("task", "classes", "train", "val", "test", "share", "old"), rows)
    print("\nparameters (--scenario-set):")
    print_table(("name", "value", "type", "help"), preset.param_table())
    print(f"\npicture: {picture}")


# -- data --------------------------------------------------------------------------------------------------------


# -- doctor and check --------------------------------------------------------------------------------------------


@app.command()
def doctor(
    data: DataOption = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for run records.")] = RUNS,
    as_json: JsonOption = False,
) -> None:
    """What is installed, which device is used, what is missing and what to do. Exit code 1 if something must be done."""
    from clbench.doctor import examine

    findings = list(examine(tuple(data or ()), out))
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_table(("topic", "state", "found", "advice"), ({**f._asdict(), "advice": f.advice or ""} for f in findings))
    raise typer.Exit(1 if any(finding.state == "missing" for finding in findings) else 0)


@app.command()
def check(
    what: Annotated[str, typer.Argument(metavar="FILE", help="A method or scenario file of yours, or the id of a built-in one.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Hyperparameter of a method (repeatable).")
    ] = None,
    scenario_set: ScenarioSetOption = None,
    data: DataOption = None,
) -> None:
    """Conformance of a method or scenario: every rule that the suite relies on. Exit code 1 if one is broken."""
    if kind_of(what) == "method":
        from clbench.learner.check import check_method

        results = [tuple(result) for result in check_method(what, parse_pairs("--set", set_))]
    else:
        from clbench.data import load
        from clbench.scenarios import registry
        from clbench.scenarios.check import check_preset

        preset = registry.find(what).with_params(parse_pairs("--scenario-set", scenario_set))
        tables = [load(name, roots=tuple(data or ())).table() for name in preset.datasets]
        results = [tuple(result) for result in check_preset(preset, tables)]
    for name, ok, message in results:
        print(f"{'ok  ' if ok else 'FAIL'}  {name}" + (f": {message}" if message else ""))
    broken = sum(not ok for _, ok, _ in results)
    print(f"{len(results) - broken} of {len(results)} checks passed")
    raise typer.Exit(1 if broken else 0)


def kind_of(what: str) -> str:
    """Whether a file (by what it defines, without running it) or an id is a `method` or a `scenario`."""
    if not (what.endswith(".py") or os.sep in what):
        return "scenario" if any(what in (s["id"], s["name"]) for s in rows_of_scenarios(RUNS)) else "method"
    import ast

    try:
        tree = ast.parse(Path(what).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {what}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"{what}{line} is not valid Python: {error.args[0]}") from None
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    if "METHOD" in names:
        return "method"
    if "build" in names:
        return "scenario"
    raise InputError(f"{what} defines neither METHOD (a method) nor build (a scenario); see docs/add-a-method.md")
