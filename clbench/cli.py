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
) -> None:
    """Run a method on a scenario, for one or several seeds.

    The same command again shows a finished run and goes on with an unfinished one.
    """
    from clbench import api


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
    from clbench.store import list_runs

    return list_runs(runs)


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
    """A plain table; wraps to a terminal's width, but never in a pipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*(column.replace("_", " ") for column in columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    console = Console()
    console.print(table, width=None if console.is_terminal else 10_000)
