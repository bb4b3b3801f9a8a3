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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clbench.errors import ClbenchError, InputError, unknown_name
from clbench.pretrain.cli import pretrain_app
from clbench.protocol.cli import protocol_app, sweep
from clbench.report import cli as report_cli
from clbench.tracking.cli import sync

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clbench.api import DryRun, Results
    from clbench.data.classes import LabelTable
    from clbench.data.store import ImageStore
    from clbench.scenarios.model import Scenario
    from clbench.scenarios.registry import Preset

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
app.add_typer(pretrain_app, name="pretrain")
app.add_typer(protocol_app, name="protocol")
app.command("sweep")(sweep)
app.command("sync")(sync)
app.command("report")(report_cli.report)
app.command("compare")(report_cli.compare)
app.command("verify")(report_cli.verify)

DataOption = Annotated[
    list[Path] | None, typer.Option("--data", metavar="DIR", help="Folder searched for data first (repeatable).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
ScenarioSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--scenario-set", metavar="KEY=VALUE", help="Parameter of the scenario (repeatable), dataset included."
    ),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return the exit code."""
    try:
        code = app(args=argv, prog_name="clbench", standalone_mode=False)
        sys.stdout.flush()  # here, where a reader that has gone is no error
    except ClbenchError as error:
        return complain(str(error), error.exit_code)
    except typer.TyperException as error:  # wrong usage: unknown option, missing value
        message = error.format_message().strip().replace("Input should be", "it should be")
        return complain(message[0].lower() + message[1:].rstrip("."), 2) if message else 2
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", 130)
    except BrokenPipeError:  # whoever read our output has gone (`clbench list runs | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


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
        list[str] | None,
        typer.Option("--backbone-set", metavar="KEY=VALUE", help="Option of the backbone (repeatable)."),
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
        int | None,
        typer.Option(metavar="N", help="Steps between evaluations, 0 for none; the scenario's if not given."),
    ] = None,
    eval_per_group: Annotated[
        int | None, typer.Option(metavar="N", help="Test images of each group per evaluation of the curve.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Rows of the stream per step.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes per task; not for online scenarios.")] = None,
    updates_per_batch: Annotated[
        int | None, typer.Option(metavar="N", help="Optimiser steps on each batch of the stream.")
    ] = None,
    train_view: Annotated[
        str | None, typer.Option(metavar="VIEW", help='Pipeline for training images, e.g. "pad_crop(4) flip".')
    ] = None,
    test_view: Annotated[
        str | None, typer.Option(metavar="VIEW", help='Pipeline for test images, e.g. "normalize(cifar100)".')
    ] = None,
    data: DataOption = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for run records.")] = RUNS,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew beside a run of the same specification.")] = False,
    side_by_side: Annotated[
        int,
        typer.Option(metavar="N", help="Seeds run at the same time in this process; fills a GPU with small networks."),
    ] = 1,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="Also log to MLflow: http://HOST:PORT, sqlite:///FILE, or local (below --out)."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look everything up, estimate time, memory and disk, train nothing.")
    ] = False,
    allow_contamination: Annotated[
        bool,
        typer.Option(
            "--allow-contamination", help="Run a backbone pretrained on the scenario's images; marks the record."
        ),
    ] = False,
    evaluator: Annotated[
        str, typer.Option(metavar="HOW", help="plain, snapshot (beside training) or graph (the same as CUDA graphs).")
    ] = "plain",
    eval_batch: Annotated[
        str | None, typer.Option(metavar="N", help="Test images of one forward pass, or `measured`; by a rule if not.")
    ] = None,
    fused: Annotated[bool, typer.Option("--fused", help="Triton kernels for reading and counting (CUDA).")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Training steps as CUDA graphs.")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile of the backbone.")] = False,
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
        "updates_per_batch": updates_per_batch,
        "train_view": train_view,
        "test_view": test_view,
        "data": tuple(data or ()),
        "out": out,
        "allow_contamination": allow_contamination,
        "evaluator": evaluator,
        "eval_batch": int(eval_batch) if eval_batch and eval_batch.isdecimal() else eval_batch,
        "fused": fused,
        "cuda_graph": cuda_graph,
        "compile": compile_,
        "checkpoint_every": checkpoint_every,
        "threads": threads,
        "keep_weights": keep_weights,
        "keep_checkpoint": keep_checkpoint,
    }
    from clbench import api

    if dry_run:
        print_dry_run(api.dry_run(method, scenario, seeds, **options))
        return
    try:
        results = api.run(
            method, scenario, seeds, fresh=fresh, progress=True, side_by_side=side_by_side, track=track, **options
        )
    except KeyboardInterrupt:
        raise typer.Exit(
            complain("interrupted; the checkpoint is saved, and the same command goes on from it", 130)
        ) from None
    print_results(results)


def print_results(results: "Results") -> None:
    """The final table, and where everything lies."""
    from clbench.report.table import level_rows, main_metrics, result_rows, results_table, table_note
    from clbench.store import RunRecord

    summaries = [run.summary for run in results]
    metrics = main_metrics(summaries, multi_domain=len(RunRecord(results[0].path).read_spec().datasets) > 1)
    print()
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(results_table(results.seeds, summaries, metrics=metrics))
    else:
        rows = result_rows(results.seeds, summaries, metrics)
        print_table(list(rows[0]), rows)
        print(table_note(rows, summaries))
    levels = level_rows(results.seeds, summaries)
    if levels:
        print()
        print_table(list(levels[0]), levels)
    print()
    for run in results:
        print(f"record  {run.path}" + (" (it had been run before)" if run.status == "found" else ""))
        if (run.path / "curve.png").exists():
            print(f"curve   {run.path / 'curve.png'}")


def print_dry_run(dry: "DryRun") -> None:
    """What would be run, where each value comes from, and what it would cost."""
    document, cost, num = dry.resolved.document, dry.estimate, len(dry.folders)
    sources = document["sources"]
    rows = [
        {"what": name, "value": value, "source": sources.get(name)}
        for name, value in document.items()
        if not isinstance(value, dict)
    ]
    rows += [{"what": f"--set {name}", **entry} for name, entry in document["hyperparameters"].items()]
    rows += [
        {"what": f"--scenario-set {name}", "value": value, "source": "scenario"}
        for name, value in document["scenario_params"].items()
    ]
    print_table(("what", "value", "source"), rows)
    print(f"\neach of {num} runs:" if num > 1 else "\nthe run:")
    print(f"  {cost.num_steps} steps, {cost.num_evaluations} evaluations, {cost.num_parameters} parameters")
    print(
        f"  about {duration(cost.total_s)}: features {duration(cost.extract_s)}, training {duration(cost.train_s)}, "
        f"evaluation {duration(cost.evaluate_s)} (from {cost.trial_steps} steps on this machine)"
    )
    print(f"  about {size(cost.memory_bytes)} of memory, up to {size(cost.disk_bytes)} on disk")
    for folder in dry.folders:
        state = "done" if (folder / "DONE").exists() else "unfinished" if folder.exists() else "new"
        print(f"  {folder} ({state})")


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    """`12.3 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


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
    "scenarios": (rows_of_scenarios, ("id", "title", "datasets", "family")),
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
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value) if value != "" else '""'


# -- show --------------------------------------------------------------------------------------------------------


@app.command()
def show(
    scenario: Annotated[str, typer.Argument(help="Scenario id or path of a scenario file.")],
    scenario_set: ScenarioSetOption = None,
    order_seed: Annotated[int, typer.Option(help="Seed of class and stream order.")] = 0,
    data: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Where the picture goes: results/scenarios/<id>.png if not given."),
    ] = None,
    with_statistics: Annotated[
        bool, typer.Option("--statistics", help="Read all images too: duplicates, label conflicts, leaks.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The task table of a scenario, and a picture of its stream."""
    from clbench.report.stream_picture import draw
    from clbench.scenarios import registry
    from clbench.scenarios.describe import describe
    from clbench.scenarios.families import FAMILIES

    preset = registry.find(scenario).with_params(parse_pairs("--scenario-set", scenario_set))
    stores = stores_of(preset, data)
    built = registry.build(preset, [store.table() for store in stores], order_seed)
    rows = describe(built)
    facts = image_statistics(built, stores) if with_statistics else {}
    picture = draw(built, out or Path("results/scenarios") / f"{built.id}.png")
    if as_json:
        about = {"id": built.id, "title": preset.title, "family": preset.family, "setting": built.setting,
                 "online": built.online, "num_classes": built.num_classes, "fingerprint": built.fingerprint,
                 "parameters": preset.param_table(), "tasks": rows, **({"statistics": facts} if facts else {}),
                 "picture": picture}  # fmt: skip
        print_json(about)
        return
    print(f"{built.id}: {preset.title}")
    print(f"source: {preset.source}")
    if preset.family is not None:
        print(f"protocol family {preset.family}: {FAMILIES[preset.family].title}")
    once = "every row once, in order" if built.online else "epochs, reshuffled"
    print(f"{built.setting}-incremental, {once}, {built.num_classes} classes, order seed {order_seed}")
    print(f"fingerprint {built.fingerprint}\n")
    print_table(("task", "classes", "train", "val", "test", "share", "old"), [shortened(row) for row in rows])
    print("\nparameters (--scenario-set):")
    print_table(("name", "value", "type", "help"), preset.param_table())
    if facts:
        print("\nimages:")
        print_table(("what", "number"), [{"what": key, "number": number} for key, number in facts.items()])
    print(f"\npicture: {picture}")


def shortened(row: dict[str, Any], most: int = 10) -> dict[str, Any]:
    """A row of the task table with at most so many class names."""
    classes = row["classes"]
    if len(classes) <= most:
        return row
    return {**row, "classes": (*classes[:most], f"... ({len(classes)})")}


def label_tables(preset: "Preset", data: Sequence[Path] | None) -> "list[LabelTable]":
    """The label tables of a scenario's data sets, rows as its recipe wants them."""
    return [store.table() for store in stores_of(preset, data)]


def stores_of(preset: "Preset", data: Sequence[Path] | None) -> "list[ImageStore]":
    """The data sets of a scenario, rows and size as its recipe wants them."""
    from clbench.data import load_all

    return load_all(
        preset.datasets, roots=tuple(data or ()), order=preset.row_order, size=preset.size, scenario=preset.id
    )


def digests_of(stores: "Sequence[ImageStore]") -> "NDArray[np.uint64]":
    """(N, 4) sha256 of the pixels of every row."""
    import numpy as np

    from clbench.data.loading import pixel_digests

    return np.concatenate([pixel_digests(store.images.numpy()) for store in stores])


def image_statistics(scenario: "Scenario", stores: "Sequence[ImageStore]") -> dict[str, int]:
    """How many images are duplicates, leaks and so on; sizes are in the task table already."""
    from clbench.scenarios.statistics import statistics

    facts = statistics(scenario, digests_of(stores))
    return {"repeats": sum(facts["repeats"])} | {key: n for key, n in facts.items() if isinstance(n, int)}


# -- export ------------------------------------------------------------------------------------------------------


@app.command("export")
def export_(
    scenario: Annotated[str, typer.Argument(help="Scenario id or path of a scenario file.")],
    to: Annotated[str, typer.Option(help="Format: parquet.")] = "parquet",
    scenario_set: ScenarioSetOption = None,
    order_seed: Annotated[int, typer.Option(help="Seed of class and stream order.")] = 0,
    with_digests: Annotated[
        bool, typer.Option("--with-digests", help="Add the sha256 of each row's pixels; reads all images.")
    ] = False,
    data: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where it goes: results/scenarios/<id>.parquet if not given."),
    ] = None,
) -> None:
    """Write a scenario's index table for other frameworks: which row comes when, as which class, seen how."""
    from clbench.interop.tables import export_parquet
    from clbench.scenarios import registry

    if to != "parquet":
        raise unknown_name("export format", to, ["parquet"], "(Avalanche: clbench.interop.avalanche, from Python)")
    preset = registry.find(scenario).with_params(parse_pairs("--scenario-set", scenario_set))
    stores = stores_of(preset, data)
    tables = [store.table() for store in stores]
    built = registry.build(preset, tables, order_seed)
    path = export_parquet(
        built, out or Path("results/scenarios") / f"{built.id}.parquet", tables, row_order=preset.row_order,
        size=preset.size, digests=digests_of(stores) if with_digests else None,
    )  # fmt: skip
    print(f"{built.id}: {built.offsets[-1]} training rows, {sum(len(g.rows) for g in built.groups)} test rows")
    print(f"fingerprint {built.fingerprint}")
    for store in stores:
        print(f"rows of {store.name}, fingerprint {store.fingerprint}")
    print(f"written to {path}")


# -- data --------------------------------------------------------------------------------------------------------


@data_app.command("status")
def data_status(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Which data sets are there, decoded or not, and what is missing."""
    from clbench.data import admin

    found = admin.status(tuple(data or ()))
    if as_json:
        print_json([entry._asdict() for entry in found])
        return
    rows = [{**entry._asdict(), "where": entry.where or None, "cached": size(entry.bytes)} for entry in found]
    print_table(("name", "state", "cached", "where"), rows)
    for entry in found:
        if entry.state == "unusable":
            print(f"\n{entry.name}: {entry.advice}")
    if any(entry.state == "missing" for entry in found):
        print("\nmissing: `clbench data fetch NAME` gets it or says which files to put where")


@data_app.command("fetch")
def data_fetch(name: Annotated[str, typer.Argument(help="Data set of `clbench list datasets`.")]) -> None:
    """Download a data set and check its published checksums. Needs a network, and torchvision."""
    from clbench.data import admin

    files = admin.fetch(name)
    print("\n".join(map(str, files)) if files else f"{name} is built in: nothing to fetch")


@data_app.command("verify")
def data_verify(
    name: Annotated[str, typer.Argument(help="Data set, or path of a folder or file.")], data: DataOption = None
) -> None:
    """Read a data set's files and its cache again and compare. Exit code 1 if something was wrong."""
    from clbench.data import admin

    report([(c.what, c.ok, c.detail) for c in admin.verify(name, tuple(data or ()))])


@data_app.command("import")
def data_import(
    path: Annotated[Path, typer.Argument(help="Folder of images (train/CLASS/*.png, ...), Parquet, standard files.")],
    name: Annotated[str, typer.Option(help="What to call it.")],
) -> None:
    """Decode data of your own into the cache, under a name that scenarios can use."""
    from clbench.data import admin

    entry = admin.import_(path, name)
    print(f"{entry.name}: {size(entry.bytes)} decoded from {entry.where}")
    print(f"use it as: clbench run ... --scenario-set dataset={entry.name}")


# -- doctor and check --------------------------------------------------------------------------------------------


@app.command()
def doctor(
    data: DataOption = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for run records.")] = RUNS,
    as_json: JsonOption = False,
) -> None:
    """What is installed, which device is used, what is missing. Exit code 1 if something must be done."""
    from clbench.doctor import examine

    findings = list(examine(tuple(data or ()), out))
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.topic:<16} {finding.found}")
            if finding.advice:
                print(f"{'':<25} -> {finding.advice}")
    raise typer.Exit(1 if any(finding.state == "missing" for finding in findings) else 0)


@app.command()
def check(
    what: Annotated[
        str, typer.Argument(metavar="FILE", help="A method or scenario file of yours, or the id of a built-in one.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Hyperparameter of a method (repeatable).")
    ] = None,
    scenario_set: ScenarioSetOption = None,
    data: DataOption = None,
) -> None:
    """Conformance of a method or scenario: every rule that the suite relies on. Exit code 1 if one is broken."""
    if kind_of(what) == "method":
        from clbench.learner.check import check_method

        results = [(c.name, c.ok, c.message) for c in check_method(what, parse_pairs("--set", set_))]
    else:
        from clbench.scenarios import registry
        from clbench.scenarios.check import check_preset

        preset = registry.find(what).with_params(parse_pairs("--scenario-set", scenario_set))
        tables = label_tables(preset, data)
        results = [(c.name, c.ok, c.message) for c in check_preset(preset, tables)]
    report(results)


def report(results: Sequence[tuple[str, bool, str]]) -> None:
    """Print checks and end with exit code 1 if one failed."""
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
