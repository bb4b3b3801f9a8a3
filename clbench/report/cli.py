"""The commands `clbench report`, `clbench compare` and `clbench verify`. Parse, call one function, print."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clbench.errors import InputError

if TYPE_CHECKING:
    from clbench.report.compare import Comparison, Difference
    from clbench.report.verify import Check

__all__ = ["compare", "report", "verify"]

MAX_TOLD = 12  # lines about records that are left out


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Option("--runs", metavar="DIR", help="Folder of run records; committed summaries too (repeatable)."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the page and the tables go.")] = Path(
        "results/leaderboard"
    ),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Leaderboard",
    date: Annotated[
        str | None, typer.Option(help="Date that the page shows: today if not given; a fixed one repeats to the byte.")
    ] = None,
) -> None:
    """Turn run records into a leaderboard: one HTML page that works offline, Markdown, CSV and LaTeX tables.

    Records of several folders are merged; what may not be compared stands in tables of its own, with the reason.
    """
    from clbench.report.leaderboard import write_report

    written = write_report(tuple(runs or (Path("results/runs"),)), out, title=title, date=date)
    rows = sum(len(board.rows) for board in written.boards)
    finished = sum(len(row.runs) for board in written.boards for row in board.rows)
    print(f"{len(written.boards)} tables, {rows} rows, {finished} finished runs")
    for board in written.boards:
        for note in board.notes:
            print(f"{board.label}: {note}")
    for item in written.left_out[:MAX_TOLD]:
        print(f"{item.name}: {item.why}")
    if len(written.left_out) > MAX_TOLD:
        print(f"and {len(written.left_out) - MAX_TOLD} more remarks on records; the page has all of them")
    for path in written.files:
        print(f"written {path}")


def compare(
    a: Annotated[Path, typer.Argument(help="A run's folder (it stands for all its seeds), or a folder of runs.")],
    b: Annotated[Path, typer.Argument(help="The other one.")],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="KEY", help="Metrics to show (repeatable); all if not given."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where the curves go: results/compare/<A>--<B>.png if not given.")
    ] = None,
) -> None:
    """What differs between two results: options, environment, numbers with a paired test over seeds, curves."""
    from clbench.report.compare import compare as compare_
    from clbench.report.compare import draw_overlay

    found = compare_(a, b, metric)
    print_comparison(found)
    picture = draw_overlay(found, out or Path("results/compare") / f"{a.resolve().name}--{b.resolve().name}.png")
    print(f"\ncurves  {picture}" if picture else "\nneither record has a curve to draw")


def print_comparison(found: "Comparison") -> None:
    for side, row in (("A", found.a), ("B", found.b)):
        runs = ", ".join(run.name for run in row.runs.values())
        print(f"{side}  {row.label} on {row.spec.scenario}, {len(row.runs)} seed{'s' * (len(row.runs) != 1)}: {runs}")
    print_differences("options", found.spec)
    print_differences("environment", found.environment)
    print()
    if found.identical:
        print("both runs ended with the same weights to the bit")
    for reason in found.refused:
        print(f"not comparable: {reason}")
    print_rows(outcome_rows(found))
    if not found.refused and any(outcome.test is not None for outcome in found.outcomes):
        if found.a.schedule != found.b.schedule:
            print(f"curve metrics are not tested: A was evaluated {found.a.schedule}; B {found.b.schedule}")
        print(
            "A - B with the half width of its 95 % interval, over pairs of the same order seed; accuracies in percent"
        )


def print_differences(what: str, found: "Sequence[Difference]") -> None:
    print(f"\n{what}: " + ("no difference" if not found else ""))
    print_rows([{"what": item.what, "A": shorten(item.a), "B": shorten(item.b)} for item in found])


def outcome_rows(found: "Comparison") -> list[dict[str, str]]:
    from clbench.metrics import find_metric
    from clbench.report.leaderboard.tables import number

    rows = []
    for outcome in found.outcomes:
        metric, test = find_metric(outcome.metric), outcome.test

        def value(x: float | None, metric=metric) -> str:  # type: ignore[no-untyped-def]
            return "-" if x is None else number(x, metric)

        row = {"metric": metric.title, "A": value(outcome.a), "B": value(outcome.b)}
        if test is not None and test.difference is not None:
            half = "" if test.half_width is None else f" ± {value(test.half_width)}"
            row |= {
                "A - B": f"{value(test.difference)}{half}", "pairs": str(test.num), "p (t)": probability(test.t_test),
                "p (Holm)": probability(outcome.holm), "p (sign flip)": probability(test.sign_flip),
            }  # fmt: skip
        rows.append(row)
    return rows


def probability(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def print_rows(rows: Iterable[dict[str, str]]) -> None:
    rows = list(rows)
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([row.get(column, "-") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def verify(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    again: Annotated[bool, typer.Option("--rerun", help="Make the run again, and compare to the bit.")] = False,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="DIR", help="Folder searched for data first (repeatable).")
    ] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Backbone weights that the run used.")] = None,
    method: Annotated[Path | None, typer.Option(metavar="FILE", help="Method file, if the run used one.")] = None,
    scenario: Annotated[Path | None, typer.Option(metavar="FILE", help="Scenario file, if the run used one.")] = None,
    device: Annotated[str | None, typer.Option(help="Device of the rerun; the record's if not given.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads; the record's if not given.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the rerun's record there.")] = None,
) -> None:
    """Compute a record's metrics again from its files; with --rerun, the run itself. Exit code 1 if they differ."""
    from clbench.report.verify import Rerun, rerun
    from clbench.report.verify import verify as verify_

    if not again and any(given is not None for given in (weights, method, scenario, device, threads, out)):
        raise InputError("--weights, --method, --scenario, --device, --threads and --out are for --rerun; add it")
    roots = tuple(data or ())
    checks = verify_(run, roots)
    print_checks(checks)
    if again:
        from clbench.report.progress import live_progress

        print("\nmade again:")
        with live_progress(f"{run} again") as display:
            repeated = rerun(run, Rerun(roots, weights, method, scenario, device, threads, out), display)
        print_checks(repeated)
        if all(check.ok is not False for check in repeated):
            print("the run repeats to the bit, in everything that its record holds")
        checks += repeated
    raise typer.Exit(1 if any(check.ok is False for check in checks) else 0)


def print_checks(checks: "Sequence[Check]") -> None:
    for check in checks:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[check.ok]
        print(f"{mark}  {check.name}" + (f": {check.detail}" if check.detail else ""))
