"""All of a report into a folder."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import clbench
from clbench.atomic import atomic_write_bytes
from clbench.report.leaderboard.boards import Board, make_boards
from clbench.report.leaderboard.page import build_page
from clbench.report.leaderboard.payload import make_payload
from clbench.report.leaderboard.records import LeftOut, gather
from clbench.report.leaderboard.tables import latex, markdown, results_csv, runs_csv

__all__ = ["Written", "write_report"]


class Written(NamedTuple):
    """files: what was written.  boards: the tables.  left_out: records that no table counts, and files that could not
    be read."""

    files: list[Path]
    boards: list[Board]
    left_out: list[LeftOut]


def write_report(folders: Sequence[Path], out: Path, *, title: str = "Leaderboard", date: str | None = None) -> Written:
    """Read every record below the folders and write `index.html`, `leaderboard.md`, `leaderboard.csv`, `runs.csv` and
    `leaderboard.tex` into `out`.

    date: what the page says of when it was made, today by default; fixed text makes reports of the same records equal
    byte for byte. Raises InputError for a folder that is not there, holds no record, or can't be written.
    """
    runs, left_out = gather(folders)
    boards, uncounted = make_boards(runs)
    left_out = [*left_out, *uncounted]
    made = {
        "title": title,
        "date": time.strftime("%Y-%m-%d", time.gmtime()) if date is None else date,
        "version": clbench.__version__,
        "records": len(runs),
    }
    payload = make_payload(boards, left_out, made)
    left_out = [*left_out, *payload.problems]
    texts = {
        "index.html": build_page(payload),
        "leaderboard.md": markdown(boards, left_out),
        "leaderboard.csv": results_csv(boards),
        "runs.csv": runs_csv(boards),
        "leaderboard.tex": latex(boards),
    }
    for name, text in texts.items():
        atomic_write_bytes(out / name, text.encode())
    return Written([out / name for name in texts], boards, left_out)
