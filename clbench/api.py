"""The suite from Python: the same runs and the same records as the command line's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench.errors import InputError, unknown_name

if TYPE_CHECKING:
    import pandas as pd

    from clbench.learner.resolve import Resolved
    from clbench.learner.run import RunResult
    from clbench.learner.spec import RunSpec
    from clbench.metrics import Aggregate
    from clbench.report.progress import BarProgress, LineProgress

__all__ = ["Results", "load_runs", "make_specs", "parse_seeds", "run"]

MAX_SEEDS = 1000


class Results(Sequence["RunResult"]):
    """Finished runs of one command, one per seed, in the order of the seeds.

    Each has `path` (its record), `summary` (every metric and time of `summary.json`) and `status`.
    """

    def __init__(self, runs: Sequence[RunResult], seeds: Sequence[int]) -> None:
        self._runs = tuple(runs)
        self.seeds = tuple(seeds)
