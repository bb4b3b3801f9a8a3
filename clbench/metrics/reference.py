"""Slow, trusted definitions, written from the card one sentence at a time, that the tests hold the metrics in use to.

A curve here is `{task: [(step, accuracy), ...]}`, one group per task; `ends[k]` is the step of task k's last update.
"""

from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "dip_reference",
    "max_drop_reference",
    "max_rise_reference",
    "max_rise_released",
    "min_accuracy_reference",
    "windowed_reference",
    "worst_case_reference",
]

Series = Sequence[tuple[int, float]]


def max_drop_reference(window: Sequence[float]) -> float:
    """Largest fall between two values of one window, at least 0. O(w^2)."""
    return max([0.0] + [a - b for i, a in enumerate(window) for b in window[i + 1 :]])


def max_rise_reference(window: Sequence[float]) -> float:
    """Largest rise between two values of one window, at least 0. O(w^2)."""
    return max([0.0] + [b - a for i, a in enumerate(window) for b in window[i + 1 :]])


def max_rise_released(window: Sequence[float]) -> float:
    """The rise as the released code of the paper finds it: a start below an earlier one is skipped, which is right for
    drops only. Kept for parity with published WP values (card section 5.2)."""
    best, highest_start = 0.0, 0.0
    for i, start in enumerate(window):
        if start >= highest_start:
            highest_start = start
            best = max([best] + [later - start for later in window[i + 1 :]])
    return best


def windowed_reference(values: Sequence[float], window: int, delta: Callable[[Sequence[float]], float]) -> float:
    """Largest `delta` over all windows of the last `window` evaluations."""
    return max(delta(values[max(0, n - window + 1) : n + 1]) for n in range(len(values)))


def min_accuracy_reference(curve: Mapping[int, Series], ends: Sequence[int]) -> float | None:
    """Mean over the left tasks of the lowest accuracy behind the end of their own task."""
    lows = [min(a for n, a in curve[k] if n > ends[k]) for k in curve if any(n > ends[k] for n, _ in curve[k])]
    return sum(lows) / len(lows) if lows else None


def worst_case_reference(curve: Mapping[int, Series], ends: Sequence[int], step: int) -> float:
    """WC-ACC at one step: the current task's accuracy and the minima of the left tasks up to here, averaged."""
    current = next(k for k, end in enumerate(ends) if step <= end)
    terms = [dict(curve[current])[step]]
    terms += [min(a for n, a in curve[k] if ends[k] < n <= step) for k in range(current)]
    return sum(terms) / len(terms)


def dip_reference(series: Series, own_end: int, next_end: int, share: float = 0.95) -> tuple[float, float | None]:
    """Gap of one task, and the steps from the switch until `share` of the old accuracy is back behind the lowest point
    (0: never below it; None: not before the next switch)."""
    before = [a for n, a in series if n <= own_end][-1]
    following = [(n, a) for n, a in series if own_end < n <= next_end]
    lowest = min(a for _, a in following)
    if lowest >= share * before:
        return before - lowest, 0.0
    bottom = next(n for n, a in following if a == lowest)
    return before - lowest, next((float(n - own_end) for n, a in following if n > bottom and a >= share * before), None)
