"""What UER, ASER, SCR, OnPro and GDumb do with input that is odd: defined, or refused in one sentence."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import learner_for, make_store, run, split_scenario

from clbench.errors import InputError, RunFailed
from clbench.evaluator import Schedule
from clbench.learner.learner import Learner
from clbench.methods.config import make_config
from clbench.methods.registry import find
from clbench.scenarios.model import Scenario

SMALL: dict[str, dict[str, Any]] = {
    "uer": {"replay_batch_size": 4},
    "aser": {"replay_batch_size": 4},
    "scr": {"replay_batch_size": 4, "projection": 8},
    "onpro": {"replay_batch_size": 4, "projection": 8, "variants": 2},
    "gdumb": {"passes": 1, "fit": "last"},
}


def learner(name: str, scenario: Scenario | None = None, **changes: Any) -> Learner:
    cls = find(name).cls
    config = cls.Config(**{"capacity": 20, **SMALL[name], **changes})
    scenario = scenario or split_scenario(make_store(), online=True)
    return learner_for(scenario, cls, config=config, schedule=Schedule(0))


def finite(done: Learner) -> bool:
    tensors = [value for module in done.method.modules() for value in module.state_dict().values()]
    return len(done.matrix) == len(done.scenario.tasks) and all(bool(torch.isfinite(t).all()) for t in tensors)


@pytest.mark.parametrize("name", ["aser", "scr", "onpro", "gdumb"])
def test_methods_that_live_on_their_memory_need_one(name: str) -> None:
    with pytest.raises(InputError, match=r"'capacity' of method .* is 0, it must be between 1"):
        make_config(find(name).cls.Config, {"--set": {"capacity": "0"}}, f"method {name}")


@pytest.mark.parametrize("name", SMALL)
def test_a_negative_capacity_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="capacity"):
        make_config(find(name).cls.Config, {"--set": {"capacity": "-1"}}, f"method {name}")


@pytest.mark.parametrize("name", SMALL)
def test_a_memory_larger_than_the_data_holds_them_all(name: str) -> None:
    done = run(learner(name, capacity=1000))
    assert len(done.method.buffer) == 72
    assert finite(done)


@pytest.mark.parametrize("name", SMALL)
def test_batches_of_one_class_and_a_class_with_one_sample(name: str) -> None:
    """Rows sorted by class in batches of 5; class 1 comes once."""
    scenario = split_scenario(make_store(), online=True)
    tasks = []
    for index, task in enumerate(scenario.tasks):
        order = task.targets.argsort(stable=True)[: 13 if index == 0 else None]
        tasks.append(task._replace(rows=task.rows[order], targets=task.targets[order]))
    done = run(learner(name, replace(scenario, tasks=tuple(tasks))))
    assert finite(done)


@pytest.mark.parametrize("name", SMALL)
def test_an_empty_first_task_is_passed_over(name: str) -> None:
    scenario = split_scenario(make_store(), online=True)
    first = scenario.tasks[0]
    tasks = (first._replace(rows=first.rows[:0], targets=first.targets[:0]), *scenario.tasks[1:])
    done = run(learner(name, replace(scenario, tasks=tasks)))
    assert finite(done)
    assert done.images_trained > 0


@pytest.mark.parametrize("name", SMALL)
def test_a_loss_that_is_not_finite_ends_the_run(name: str) -> None:
    with pytest.raises(RunFailed, match=r"loss became (nan|inf) at step \d+; lower the learning rate"):
        run(learner(name, lr=1e37, **({"passes": 5} if name == "gdumb" else {})))
