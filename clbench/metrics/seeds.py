"""The same metrics over several seeds: mean, spread, and a 95 % interval of the mean."""

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

__all__ = ["Aggregate", "aggregate", "t_quantile"]


class Aggregate(NamedTuple):
    """mean and std (n - 1 in the denominator) over `num` runs; mean ± half_width is the 95 % t interval of the mean.
    With one run std and half_width are None."""

    mean: float
    std: float | None
    half_width: float | None
    num: int


def aggregate(runs: Iterable[Mapping[str, float | None]]) -> dict[str, Aggregate]:
    """Summarise each metric over the runs where it is defined; a metric defined in none is left out.

    >>> aggregate([{"a": 0.5}, {"a": 0.7}])["a"].mean
    0.6
    """
    columns: dict[str, list[float]] = {}
    for run in runs:
        for key, value in run.items():
            if value is not None:
                columns.setdefault(key, []).append(float(value))
    return {key: _aggregate(values) for key, values in columns.items()}


@cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = level for Student's t with a whole number of degrees of freedom.

    Solves the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4 by bisection: exact, and the engine needs no scipy.
    """
    if degrees < 1 or not 0 <= level < 1:
        raise ValueError(f"need at least one degree of freedom and a level in [0, 1), not {degrees} and {level}")
    low, high = 0.0, 1.0
    while _central_probability(high, degrees) < level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _aggregate(values: list[float]) -> Aggregate:
    num = len(values)
    mean = math.fsum(values) / num
    if num == 1:
        return Aggregate(mean, None, None, 1)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (num - 1))
    return Aggregate(mean, std, t_quantile(num - 1) * std / math.sqrt(num), num)


def _central_probability(t: float, degrees: int) -> float:
    """P(|T| <= t). With cos² = degrees / (degrees + t²): a polynomial in cos² of degree about degrees / 2."""
    angle = math.atan(t / math.sqrt(degrees))
    cos2 = math.cos(angle) ** 2
    odd = degrees % 2
    term, total = 1.0, 0.0
    for k in range(degrees // 2):
        total += term
        term *= cos2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    return math.sin(angle) * total
