"""Which trials are drawn: the same every time, shared between methods, and a function of scores alone."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from clbench.errors import InputError
from clbench.protocol.draws import quasi_points, uniform_points
from clbench.protocol.search import Ask, SearchPlan, asks
from clbench.protocol.space import Dimension, Space

SPACE = Space((Dimension("lr", low=1e-3, high=0.1, scale="log"), Dimension("batch_size", choices=(8, 16, 32))))
SEEDS = (5, 6, 7)


def play(plan: SearchPlan, score: Callable[[Ask], float | None], num_tasks: int = 10) -> list[list[Ask]]:
    """All lists that a search asks for, if trials score so."""
    search = asks(plan, SPACE, SEEDS, num_tasks)
    lists, answer = [], None
    while True:
        try:
            wanted = search.send(answer) if answer is not None else next(search)
        except StopIteration:
            return lists
        lists.append(wanted)
        answer = {ask.trial: score(ask) for ask in wanted}


def by_rate(ask: Ask) -> float:
    return float(ask.values["lr"])


@pytest.mark.parametrize("points", [uniform_points, quasi_points])
def test_the_same_name_gets_the_same_numbers_in_every_space(points: Any) -> None:
    """Common random numbers (card, section 5.1)."""
    small, large = points(["lr"], 9, 3), points(["alpha_2", "batch_size", "lr", "zeta"], 9, 3)
    assert [p["lr"] for p in small] == [p["lr"] for p in large]
    assert points(["lr"], 9, 4) != small
    assert points(["lr"], 5, 3) == small[:5]
    assert all(0 <= value < 1 for p in large for value in p.values())
    assert len({tuple(p.values()) for p in large}) == 9


def test_quasi_points_fill_every_eighth() -> None:
    for name in ("lr", "batch_size"):
        values = [p[name] for p in quasi_points(["lr", "batch_size"], 8, 0)]
        assert sorted(int(value * 8) for value in values) == list(range(8))


@pytest.mark.parametrize("kind", ["uniform", "quasi", "tpe", "halving"])
def test_a_rerun_draws_the_same_trials(kind: Any) -> None:
    plan = SearchPlan(kind, 12, seed=2)
    first = play(plan, by_rate)
    assert first == play(plan, by_rate)
    assert first != play(SearchPlan(kind, 12, seed=3), by_rate)
    drawn = {ask.trial: dict(ask.values) for wanted in first for ask in wanted}
    assert sorted(drawn) == list(range(12))
    assert all(1e-3 <= v["lr"] <= 0.1 and v["batch_size"] in (8, 16, 32) for v in drawn.values())


def test_draws_are_the_same_in_another_process() -> None:
    code = "from clbench.protocol.draws import *; print(uniform_points(['lr'], 3, 1), quasi_points(['lr'], 3, 1))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"{uniform_points(['lr'], 3, 1)} {quasi_points(['lr'], 3, 1)}"


def test_tpe_learns_from_scores_and_survives_failed_trials() -> None:
    plan = SearchPlan("tpe", 40, batch=4)

    def score(ask: Ask) -> float | None:
        return None if ask.trial % 7 == 3 else -abs(ask.values["lr"] - 0.05)

    lists = play(plan, score)
    assert [len(wanted) for wanted in lists] == [4] * 10
    early = [abs(ask.values["lr"] - 0.05) for wanted in lists[:3] for ask in wanted]
    late = [abs(ask.values["lr"] - 0.05) for wanted in lists[-3:] for ask in wanted]
    assert sum(late) < sum(early)


def test_halving_keeps_the_best_and_ends_with_all_seeds() -> None:
    lists = play(SearchPlan("halving", 9, eta=3), lambda ask: None if ask.trial == 8 else float(ask.trial))
    assert [(w[0].first_tasks, w[0].seeds, [ask.trial for ask in w]) for w in lists] == [
        (3, (5,), list(range(9))),
        (None, (5,), [5, 6, 7]),
        (None, SEEDS, [7]),
    ]


def test_halving_without_survivors_ends() -> None:
    assert len(play(SearchPlan("halving", 4), lambda ask: None)) == 1


def test_few_tasks_need_no_first_rung() -> None:
    lists = play(SearchPlan("halving", 3), by_rate, num_tasks=3)
    assert [wanted[0].first_tasks for wanted in lists] == [None, None]


@pytest.mark.parametrize("given", [{"trials": 0}, {"trials": -3}, {"trials": 5, "batch": 0}, {"trials": 5, "eta": 1}])
def test_impossible_plans_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(InputError):
        SearchPlan("uniform", **given)


def test_missing_optuna_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"clbench\[tune\]"):
        play(SearchPlan("tpe", 3), by_rate)
