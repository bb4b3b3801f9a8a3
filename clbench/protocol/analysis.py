"""What a study tells beyond its winner. Pure functions of study and evaluation files, and of the records' times."""

from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from clbench.metrics import Aggregate, aggregate, find_metric
from clbench.store.record import RunRecord

__all__ = ["Influence", "Spent", "expected_best", "influence", "score_of", "spent", "trial_scores"]

BINS = 4


def trial_scores(study: Mapping[str, Any]) -> list[float]:
    """Scores of all trials in order, oriented so that larger is better. A failed trial counts as the worst score of the
    others: whoever draws it must draw again or live with that.

    Empty for searches whose trials are not exchangeable (`tpe` looks at earlier scores, `halving` stops some): the best
    of a subset of them says nothing about a smaller study.
    """
    if study["search"]["kind"] not in ("uniform", "quasi"):
        return []
    sign = 1.0 if find_metric(study["score"]).higher_is_better else -1.0
    full = [t["score"] for t in study["trials"] if ran_in_full(study, t) or t["status"] == "failed"]
    scores = [sign * score for score in full if score is not None]
    return [min(scores) if score is None else sign * score for score in full] if scores else []


def ran_in_full(study: Mapping[str, Any], trial: Mapping[str, Any]) -> bool:
    """All tasks, all seeds: not left early by successive halving."""
    return trial["first_tasks"] is None and trial["status"] == "done" and len(trial["scores"]) == len(study["seeds"])


def expected_best(scores: Sequence[float]) -> list[float]:
    """E[max of k of the n scores], for k = 1 .. n: the mean over all subsets of size k, without replacement.

    In closed form: the i-th smallest score (from 1) is the largest of C(i-1, k-1) of the C(n, k) subsets. With k = n it
    is the best of all. What a study with fewer trials would have found, so that cheap and dear studies compare.

    >>> expected_best([1.0, 3.0])
    [2.0, 3.0]
    """
    ordered = sorted(scores)
    num = len(ordered)
    return [sum(score * comb(i, k - 1) for i, score in enumerate(ordered)) / comb(num, k) for k in range(1, num + 1)]


class Influence(dict[str, Any]):
    """How much one dimension mattered: `name`; `explained`, the share of the scores' variance between its bins,
    adjusted for their number (epsilon squared; 0 if chance alone would give as much); `rank_correlation`, Spearman's,
    for ordered values, else None; `best`: bin with the highest mean."""


def influence(study: Mapping[str, Any]) -> list[Influence]:
    """Sensitivity per dimension, most influential first, from the trials that ran in full. Choices are bins of their
    own, a range is cut into at most 4 bins of equal numbers. Marginal: interactions are not told apart."""
    sign = 1.0 if find_metric(study["score"]).higher_is_better else -1.0
    full = [t for t in study["trials"] if ran_in_full(study, t)]
    scores = np.array([sign * t["score"] for t in full])
    found = []
    for name, space in study["space"].items():
        values = [t["values"][name] for t in full]
        ordered = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        labels, of = bins(values, choices="choices" in space)
        found.append(
            Influence(
                name=name,
                explained=explained(scores, of, len(labels)),
                rank_correlation=spearman(np.array(values, float), scores) if ordered else None,
                best=labels[int(np.argmax([scores[of == b].mean() for b in range(len(labels))]))] if labels else "",
            )
        )
    return sorted(found, key=lambda each: -each["explained"])


def bins(values: Sequence[Any], *, choices: bool) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Labels of the bins that hold a value, and the bin of each value."""
    if choices:
        names = list(dict.fromkeys(sorted(map(str, values)) if not _numbers(values) else sorted(values)))
        return [str(name) for name in names], np.array([[str(n) for n in names].index(str(v)) for v in values], int)
    array = np.array(values, float)
    order = np.argsort(np.argsort(array, kind="stable"), kind="stable")
    num = min(BINS, max(len(array) // 3, 1)) if len(array) else 0
    of = order * num // max(len(array), 1)
    labels = [f"{array[of == b].min():.3g} to {array[of == b].max():.3g}" for b in range(num)]
    return labels, of


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) for v in values)


def explained(scores: np.ndarray[Any, Any], of: np.ndarray[Any, Any], num: int) -> float:
    """Epsilon squared: (between - (bins - 1) * within / (n - bins)) / total sums of squares, not below 0."""
    total = float(((scores - scores.mean()) ** 2).sum()) if len(scores) else 0.0
    if num < 2 or len(scores) <= num or total == 0:
        return 0.0
    within = sum(float(((scores[of == b] - scores[of == b].mean()) ** 2).sum()) for b in range(num))
    return max((total - within - (num - 1) * within / (len(scores) - num)) / total, 0.0)


def spearman(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None if one of them does not vary."""
    a, b = ranks(x), ranks(y)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def score_of(evaluation: Mapping[str, Any], metric: str) -> Aggregate | None:
    """Mean, sd and interval of a metric over the evaluation's seeds that finished: class orders, not trials."""
    return aggregate({metric: run["metrics"].get(metric)} for run in evaluation["runs"]).get(metric)


class Spent(dict[str, float]):
    """`runs` and `seconds` (train, evaluate, data, features, checkpoints; over all starts) of tuning and evaluation."""


def spent(folder: Path, study: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> dict[str, Spent]:
    """What a study cost, from its run records: `tuning` and `evaluation`. A run that serves two trials counts once."""
    trials = {
        path
        for trial in study["trials"]
        for rung in [trial, *trial.get("earlier", [])]
        for path in rung["runs"].values()
    }
    out = {"tuning": _sum(folder / "trials", trials)}
    if evaluation is not None:
        out["evaluation"] = _sum(folder / "evaluation", {run["run"] for run in evaluation["runs"] if run["run"]})
    return out


def _sum(root: Path, paths: set[str]) -> Spent:
    seconds = sum(sum(RunRecord(root / path).read_summary()["times"].values()) for path in sorted(paths))
    return Spent(runs=len(paths), seconds=seconds)
