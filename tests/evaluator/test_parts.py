"""Counting in parts changes no count, and gives what the noise of minima is estimated from."""

import copy
from typing import Any

import pytest
import torch
from tiny import make_store, split_scenario

from clbench.data.reader import Reader
from clbench.errors import InputError
from clbench.evaluator import Evaluator
from clbench.evaluator.parts import PARTS, PartsEvaluator, shares
from clbench.learner.resolve import resolve
from clbench.learner.run import make_learner
from clbench.learner.spec import RunSpec


def digits(**changes: Any) -> RunSpec:
    options = {"epochs": 1, "eval_every": 5, "eval_per_group": 30, "device": "cpu", **changes}
    return RunSpec(method="finetune", scenario="split-digits", scenario_params={"per_class": 24}, **options)


def run(spec: RunSpec, save: Any = lambda state: None) -> Any:
    learner = make_learner(resolve(spec), save=save)
    with torch.random.fork_rng([]):
        learner.run()
    return learner


def test_groups_count_what_their_parts_count() -> None:
    learner = run(digits())
    evaluator = learner.evaluator
    assert isinstance(evaluator, PartsEvaluator)
    drained = evaluator.drain()
    assert torch.equal(drained["parts"].sum(dim=2), drained["hits"])
    assert torch.equal(drained["part_totals"].sum(dim=1), drained["totals"])
    assert drained["part_totals"].tolist() == [[3] * PARTS] * 5
    plain = Evaluator(
        learner.scenario, learner.stream.read, view="test", mask="seen", per_group=30, slots=1, seed=0
    )  # fmt: skip
    plain.observe(learner.method, 4, 0, 1, 10**9)
    assert torch.equal(plain.drain()["hits"][0], drained["hits"][-1])


def test_parts_are_random_of_equal_size_and_fixed_by_the_seed() -> None:
    first = shares(47, 0, 1)
    assert torch.equal(first, shares(47, 0, 1))
    assert not torch.equal(first, shares(47, 1, 1))
    assert set(torch.bincount(first, minlength=PARTS).tolist()) == {4, 5}
    assert torch.bincount(shares(3, 0, 0), minlength=PARTS).tolist()[:3] == [1, 1, 1]


def test_parts_survive_a_resume() -> None:
    states: list[dict[str, Any]] = []
    whole = run(digits(checkpoint_every=7), lambda state: states.append(copy.deepcopy(state)))
    resumed = make_learner(resolve(digits()))
    resumed.load_state_dict(states[len(states) // 2])
    with torch.random.fork_rng([]):
        resumed.run()
    assert torch.equal(whole.evaluator.drain()["parts"], resumed.evaluator.drain()["parts"])


def test_a_checkpoint_without_parts_is_refused() -> None:
    store = make_store()
    scenario = split_scenario(store)
    reader = Reader(store, {"train": "", "test": ""})
    options: dict[str, Any] = {"view": "test", "mask": "all", "per_group": 5, "slots": 1, "seed": 0}
    old = Evaluator(scenario, reader, **options)
    with pytest.raises(InputError, match="use --fresh"):
        PartsEvaluator(scenario, reader, **options).load_state_dict(old.state_dict())
