"""Over scenarios: which methods share enough of them for average ranks and a critical difference."""

from collections.abc import Sequence
from typing import NamedTuple

from clbench.metrics import find_metric
from clbench.report.leaderboard.boards import Board, Row
from clbench.report.leaderboard.provenance import BADGES
from clbench.report.leaderboard.statistics import Ranking, critical_difference

__all__ = ["Overall", "overall", "row_of"]


class Overall(NamedTuple):
    """ranking: None if there is too little to compare, then `reason` says what is missing. boards: labels of the
    scenarios it is over. left_out: methods that lack a result on one of them."""

    metric: str
    ranking: Ranking | None
    boards: tuple[str, ...]
    left_out: tuple[str, ...]
    reason: str


def row_of(board: Board, method: str, metric: str) -> Row | None:
    """The row that stands for a method on a board: the best provenance, then most seeds, then the order of rows. Never
    the one with the best number: that would choose on the test set."""
    rows = [row for row in board.rows if row.method == method and board.comparable(row, metric)]
    return min(rows, key=lambda row: (BADGES.index(row.provenance.badge), -len(row.runs)), default=None)


def overall(boards: Sequence[Board], metric: str) -> Overall:
    """Rank methods over scenarios. Of several boards of one scenario the one with the most methods counts: they share
    their data and are not independent."""
    by_scenario: dict[str, tuple[Board, dict[str, float]]] = {}
    sign = 1.0 if find_metric(metric).higher_is_better else -1.0
    for board in boards:
        scores = {}
        for method in dict.fromkeys(row.method for row in board.rows):
            row = row_of(board, method, metric)
            if row is not None:
                scores[method] = sign * row.stats[metric].mean
        known = by_scenario.get(board.scenario)
        if known is None or len(scores) > len(known[1]):
            by_scenario[board.scenario] = (board, scores)
    methods = sorted({method for _, scores in by_scenario.values() for method in scores})
    chosen, shared = _complete([scores for _, scores in by_scenario.values()], methods)
    if len(chosen) < 3 or len(shared) < 3:
        reason = "needs at least 3 methods with results on the same 3 scenarios; these records have no such set"
        return Overall(metric, None, (), (), reason)
    table = [[scores[method] for method in chosen] for scores in shared]
    labels = tuple(board.label for board, scores in by_scenario.values() if any(scores is each for each in shared))
    left_out = tuple(method for method in methods if method not in chosen)
    return Overall(metric, critical_difference(chosen, table), labels, left_out, "")


def _complete(tables: Sequence[dict[str, float]], methods: Sequence[str]) -> tuple[list[str], list[dict[str, float]]]:
    """Methods and scenarios without a gap: of the sets with at least 3 of each, found by giving up the method with the
    fewest scenarios again and again, the one with the most cells."""
    best: tuple[list[str], list[dict[str, float]]] = ([], [])
    left = list(methods)
    while len(left) >= 3:
        shared = [scores for scores in tables if all(method in scores for method in left)]
        if len(shared) >= 3 and len(left) * len(shared) > len(best[0]) * len(best[1]):
            best = (list(left), shared)
        counts = {method: sum(method in scores for scores in tables) for method in left}
        left.remove(min(reversed(left), key=lambda method: counts[method]))
    return best
