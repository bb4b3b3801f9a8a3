"""May a difference be believed? Paired tests over seeds on one scenario, and average ranks over scenarios.

Two rows are paired by order seed (class order and stream), which moves results most; where a row has several runs of
one order seed, by order seed and run seed. With n pairs an exact test cannot give less than 2 / 2^n: five seeds never
reach 0.05 that way, and the t test leans on differences being about normal. Both are shown, with the interval.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from clbench.metrics import t_quantile

__all__ = ["Paired", "Ranking", "critical_difference", "holm", "pair_up", "paired_test"]

MAX_EXACT = 14  # pairs; 2^14 sign patterns are enumerated at most
Key = tuple[int, int]


class Paired(NamedTuple):
    """a - b over `num` pairs. half_width: of the 95 % t interval. t_test, sign_flip: two-sided p values; None where
    there are too few pairs, too many to enumerate, or differences that do not vary."""

    num: int
    difference: float | None
    half_width: float | None
    t_test: float | None
    sign_flip: float | None


def pair_up(a: Mapping[Key, float], b: Mapping[Key, float]) -> list[tuple[float, float]]:
    """Values of two rows that belong together; keys are (order seed, run seed)."""
    if _by_order(a) and _by_order(b):
        first, second = {key[0]: value for key, value in a.items()}, {key[0]: value for key, value in b.items()}
        return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return [(a[key], b[key]) for key in sorted(a.keys() & b.keys())]


def _by_order(values: Mapping[Key, float]) -> bool:
    return len({order for order, _ in values}) == len(values)


def paired_test(pairs: Sequence[tuple[float, float]]) -> Paired:
    """Is the mean of a - b zero? Paired t test, and the exact sign-flip test (all 2^n signs of the differences).

    >>> paired_test([(0.9, 0.5), (0.8, 0.5), (0.7, 0.5)]).sign_flip
    0.25
    """
    differences = np.array([first - second for first, second in pairs], np.float64)
    num = len(differences)
    if not num:
        return Paired(0, None, None, None, None)
    mean = float(differences.mean())
    exact = _sign_flip(differences) if 2 <= num <= MAX_EXACT else None
    if num < 2:
        return Paired(num, mean, None, None, None)
    spread = float(differences.std(ddof=1))
    half = t_quantile(num - 1) * spread / math.sqrt(num)
    if spread <= 1e-12 * max(1.0, abs(mean)):  # equal everywhere: no doubt if they are all 0, no test otherwise
        return Paired(num, mean, 0.0, 1.0 if mean == 0 else None, exact)
    from scipy.special import stdtr

    return Paired(num, mean, half, float(2 * stdtr(num - 1, -abs(mean) * math.sqrt(num) / spread)), exact)


def _sign_flip(differences: np.ndarray) -> float:
    signs = np.array(list(product((1.0, -1.0), repeat=len(differences))))
    sums = np.abs(signs @ differences)
    return float((sums >= abs(differences.sum()) * (1 - 1e-12)).mean())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None stays None and does not count.

    >>> holm([0.01, 0.04, None])
    [0.02, 0.04, None]
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    out: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        out[index] = highest
    return out


class Ranking(NamedTuple):
    """methods in order of their mean rank over `num` scenarios (1 is best). friedman: p value of "all alike".
    critical: Nemenyi's critical difference at 0.05.  groups: first and last index of neighbours that are not told
    apart."""

    methods: tuple[str, ...]
    mean_ranks: tuple[float, ...]
    num: int
    friedman: float
    critical: float
    groups: tuple[tuple[int, int], ...]


def critical_difference(methods: Sequence[str], scores: ArrayLike) -> Ranking:
    """Friedman's test and Nemenyi's critical difference (Demsar 2006).

    scores: (N scenarios, k methods), larger is better, no NaN; at least 3 of each. Equal scores share their mean rank.
    """
    from scipy.special import chdtrc

    table = np.asarray(scores, np.float64)
    num, k = table.shape
    if num < 3 or k < 3 or not np.isfinite(table).all():
        raise ValueError("a critical difference needs at least 3 methods with a score on each of at least 3 scenarios")
    ranks = np.stack([mean_ranks(-row) for row in table])
    means = ranks.mean(axis=0)
    between = 12 * num / (k * (k + 1)) * float(((means - (k + 1) / 2) ** 2).sum())
    ties = sum(float((counts**3 - counts).sum()) for counts in (np.unique(row, return_counts=True)[1] for row in ranks))
    spread = 1 - ties / (num * k * (k * k - 1))
    p = float(chdtrc(k - 1, between / spread)) if spread > 0 else 1.0
    critical = range_quantile(k) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * num))
    order = np.argsort(means, kind="stable")
    ordered = means[order]
    groups: list[tuple[int, int]] = []
    for first in range(k):
        last = int(np.flatnonzero(ordered - ordered[first] < critical)[-1])
        if last > first and not any(last <= known for _, known in groups):
            groups.append((first, last))
    return Ranking(
        tuple(methods[index] for index in order), tuple(float(x) for x in ordered), num, p, critical, tuple(groups)
    )


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """(k,) rank of each value, the smallest first; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


@cache
def range_quantile(k: int, level: float = 0.95) -> float:
    """The q with P(largest - smallest of k standard normal numbers <= q) = level: the studentised range with endless
    degrees of freedom, which Nemenyi's test takes.

    P = k * integral of density(z) * (cdf(z) - cdf(z - q))^(k - 1) dz, by the trapezoidal rule, solved by bisection.
    """
    from scipy.special import ndtr

    z = np.linspace(-9, 9, 4001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        probability = k * np.trapezoid(density * (ndtr(z) - ndtr(z - middle)) ** (k - 1), z)
        low, high = (middle, high) if probability < level else (low, middle)
    return (low + high) / 2
