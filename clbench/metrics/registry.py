"""What every metric of `summary.json` is. Reads `registry.toml`: no torch, no numpy of its own."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from clbench.errors import unknown_name

__all__ = ["Metric", "find_metric", "list_metrics"]


@dataclass(frozen=True)
class Metric:
    """unit: `fraction` in [0, 1] (a difference of fractions may be negative), `steps`, `samples`, or `count`.

    sampling_error: whether `<key>_se` stands beside it, the standard error of its evaluation subset.
    main: whether it belongs in a table of main results.
    """

    key: str
    title: str
    formula: str
    source: str
    higher_is_better: bool
    unit: Literal["fraction", "steps", "samples", "count"] = "fraction"
    sampling_error: bool = False
    main: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries of a summary that belong to it."""
        return (self.key, f"{self.key}_se") if self.sampling_error else (self.key,)


@cache
def list_metrics() -> tuple[Metric, ...]:
    """All metrics, in the order in which tables show them."""
    with (Path(__file__).parent / "registry.toml").open("rb") as file:
        return tuple(Metric(key=key, **entry) for key, entry in tomllib.load(file).items())


def find_metric(key: str) -> Metric:
    """The metric called `key`; InputError with the nearest names if there is none."""
    for metric in list_metrics():
        if metric.key == key:
            return metric
    raise unknown_name("metric", key, (metric.key for metric in list_metrics()))
