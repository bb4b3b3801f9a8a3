"""`clbench sync`."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["sync"]


def sync(
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder of run records.")] = Path("results/runs"),
    track: Annotated[
        str | None,
        typer.Option(
            metavar="URI", help="Log all finished runs to this MLflow store: http://HOST:PORT, sqlite:///FILE."
        ),
    ] = None,
) -> None:
    """Log runs to MLflow that were run with --track and could not be logged then.

    Each goes to the store it was meant for; with --track all finished runs go to that one. Runs that are there already
    are left alone.
    """
    from clbench.tracking.runs import store_uri, sync_runs

    done = sync_runs(runs, None if track is None else store_uri(track, runs))
    for path, reason in done.failed:
        print(f"not logged: {path}: {reason}")
    print(f"{len(done.logged)} runs logged, {len(done.known)} had been logged before, {len(done.failed)} failed")
    if done.failed:
        raise typer.Exit(1)
