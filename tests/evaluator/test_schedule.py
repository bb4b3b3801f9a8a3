"""The schedule: what it counts, and that the fitted one keeps to its budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench.evaluator import Schedule, fit_schedule
from clbench.learner.resolve import resolve
from clbench.learner.spec import RunSpec


@given(st.integers(0, 50), st.integers(0, 20), st.integers(0, 300))
def test_count_is_the_number_of_due_steps_and_the_end(every: int, dense: int, steps: int) -> None:
    schedule = Schedule(every, dense)
    due = {n for n in range(1, steps + 1) if schedule.due(n)}
    if every and steps:
        due.add(steps)
    assert schedule.count(steps) == len(due)


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 64), st.integers(1, 2000)), min_size=1, max_size=8),
    st.integers(0, 40),
)
def test_fitted_schedule_costs_no_more_than_training(tasks: list[tuple[int, int, int]], dense: int) -> None:
    steps = [n for n, _, _ in tasks]
    trained = [n * batch for n, batch, _ in tasks]
    tested = [images for _, _, images in tasks]
    schedule = fit_schedule(steps, trained, tested, dense)

    def cost(candidate: Schedule) -> int:
        return sum(candidate.count(n) * images for n, images in zip(steps, tested, strict=True))

    assert schedule.every >= 1
    ends_alone = cost(Schedule(max(steps) or 1, 0))
    if cost(schedule) > 3 * sum(trained):  # the ends of the tasks alone may be dearer than tiny tasks
        assert cost(schedule) == ends_alone
    elif schedule.every > 1:  # and it is the densest that fits
        assert cost(Schedule(schedule.every - 1, schedule.dense)) > 3 * sum(trained)
    if schedule.every > 1 and schedule.dense < dense:  # one dense step more costs more than half of the budget
        assert cost(Schedule(max(steps), schedule.dense + 1)) > 1.5 * sum(trained)


def test_a_cheap_evaluation_happens_at_every_step() -> None:
    assert fit_schedule([100, 100], [6400, 6400], [50, 100], 10) == Schedule(1, 0)


def test_zero_means_never() -> None:
    assert Schedule(0, 5).count(100) == 0
    assert not Schedule(0, 5).due(1)


@pytest.mark.parametrize(
    ("scenario", "given_every", "every", "dense", "source"),
    [
        ("split-digits", None, 1, 0, "scenario"),  # dearer than training, and asked for
        ("split-digits-a", None, 10, 50, "scenario"),
        ("split-digits", 7, 7, 0, "--eval-every"),
    ],
)
def test_who_says_how_densely_a_run_is_watched(
    scenario: str, given_every: int | None, every: int, dense: int, source: str
) -> None:
    document = resolve(RunSpec(method="finetune", scenario=scenario, eval_every=given_every)).document
    assert (document["eval_every"], document["eval_dense"]) == (every, dense)
    assert document["sources"]["eval_every"] == source


def test_a_scenario_that_says_nothing_is_watched_as_its_cost_allows() -> None:
    document = resolve(RunSpec(method="finetune", scenario="rotated-digits")).document
    assert document["eval_every"] > 1
    assert 0 < document["eval_dense"] <= 50
    assert "cost" in document["sources"]["eval_every"]
