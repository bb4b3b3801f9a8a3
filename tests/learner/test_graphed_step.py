"""Steps in three parts: the same numbers from inputs that stay where they are; what cannot be captured is refused."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny import Flat, assert_survives_kill, equal, learner_for, make_store, outcome, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError, RunFailed
from clbench.evaluator import Schedule
from clbench.learner.check import finished, prepared, weights
from clbench.learner.graphed_step import MOST, GraphedStep, check_graphable, make_capturable, numbers, signature
from clbench.learner.learner import Learner
from clbench.learner.run import weights_of
from clbench.learner.spec import RunSpec
from clbench.methods.base import Method
from clbench.methods.er import ER, ERConfig
from clbench.methods.finetune import Finetune
from clbench.methods.joint import Joint

CPU = torch.device("cpu")


class Dropping(Flat):
    """Draws from the global generator."""

    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(super().forward(images), 0.3, self.training)


def made(method: type[Method], graphed: bool, *, online: bool = False, **options: Any) -> Learner:
    options.setdefault("schedule", Schedule(0))
    learner = learner_for(split_scenario(make_store(), online=online), method, backbone=Dropping, **options)
    learner.cuda_graph = graphed
    return learner


@pytest.mark.parametrize("method", [Finetune, Joint, ER])
@pytest.mark.parametrize("online", [False, True])
def test_the_parts_from_fixed_inputs_are_the_step(method: type[Method], online: bool) -> None:
    """Batches of several sizes, an empty and a filling memory, dropout, momentum."""
    options = {"config": method.Config(momentum=0.5)}
    plain, graphed = (run(made(method, on, online=online, **options)) for on in (False, True))
    assert equal(outcome(plain), outcome(graphed))


def test_a_graphed_run_survives_a_kill() -> None:
    config = ERConfig(optimizer="adam", lr=0.01)

    def make(**options: Any) -> Learner:
        return made(ER, True, config=config, **options)

    assert_survives_kill(make, at_most=4)


class Counting(Finetune):
    graphable = True

    def __init__(self, config: Any, backbone: nn.Module, setting: Any) -> None:
        super().__init__(config, backbone, setting)
        self.updates = 0

    def update(self, inputs: Any) -> Mapping[str, Tensor]:
        self.updates += 1
        return super().update(inputs)


def test_an_update_that_changes_a_number_is_named() -> None:
    with pytest.raises(RunFailed, match=r"Counting.update changes updates, which a CUDA graph would not do"):
        run(made(Counting, True))


class WhereAmI(Finetune):
    graphable = True

    def update(self, inputs: Any) -> Mapping[str, Tensor]:
        return {**super().update(inputs), "task": torch.tensor(float(inputs.at.task))}


def test_an_update_cannot_look_at_the_cursor() -> None:
    assert set(run(made(WhereAmI, False)).losses.names) == {"loss", "task"}
    with pytest.raises(AttributeError):
        run(made(WhereAmI, True))


class EverNew(Finetune):
    graphable = True

    def draw(self, batch: Any) -> Any:
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + batch.at.step)
        return batch


def test_a_rate_that_changes_all_the_time_is_named() -> None:
    learner = learner_for(split_scenario(make_store(), tasks=1), EverNew, schedule=Schedule(0))
    plan = learner.plans()[0][0]
    step = GraphedStep(learner.method, CPU)
    batches = [learner.stream.batch(plan, learner.at._replace(step=number)) for number in range(MOST + 1)]
    for batch in batches[:MOST]:
        step(batch)
    with pytest.raises(RunFailed, match=f"more than {MOST} CUDA graphs"):
        step(batches[MOST])


class Silent(Finetune):
    pass


class OneStep(ER):
    graphable = True

    def step(self, batch: Any) -> Mapping[str, Tensor]:
        return super().step(batch)


def test_only_methods_that_say_so_themselves_are_captured() -> None:
    for cls in (Finetune, Joint, ER):
        check_graphable(cls, "it")
    with pytest.raises(InputError, match="does not say that its step can be captured"):
        check_graphable(Silent, "silent")
    with pytest.raises(InputError, match="overrides step"):
        check_graphable(OneStep, "one")


def test_adam_counts_and_takes_its_rate_on_the_device() -> None:
    weight = nn.Parameter(torch.ones(3))
    adam, sgd = torch.optim.Adam([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(3)
    adam.step(), adam.step()
    for optimizer in (adam, sgd):
        make_capturable(optimizer)
    group = adam.param_groups[0]
    assert group["capturable"]
    assert torch.equal(group["lr"], torch.tensor(0.1))
    assert torch.equal(adam.state[weight]["step"], torch.tensor(2.0)), "steps done before count"
    assert sgd.param_groups[0]["lr"] == 0.1, "SGD reads its rate on the host: a graph keeps it"


def test_sgd_takes_a_rate_that_is_a_tensor_from_where_it_lies() -> None:
    rate = torch.tensor(0.1)
    ours, plain = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.SGD([ours], lr=rate, momentum=0.9, weight_decay=0.01)
    expected = torch.optim.SGD([plain], lr=0.1, momentum=0.9, weight_decay=0.01)
    make_capturable(optimizer)
    before = numbers(optimizer)
    for step in range(1, 6):
        rate.fill_(0.1 / step)
        expected.param_groups[0]["lr"] = 0.1 / step
        ours.grad = torch.arange(3.0) - step
        plain.grad = ours.grad.clone()
        optimizer.step(), expected.step()
    group = optimizer.param_groups[0]
    assert group["lr"] is rate
    assert (group["fused"], group["foreach"]) == (True, False), "other forms read it on the host"
    assert numbers(optimizer) == before, "another rate is no other graph"
    torch.testing.assert_close(ours, plain)


def test_a_rate_on_the_host_is_fixed_in_a_graph() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3, device="meta"))], lr=rate)  # stands for another device
    before = numbers(optimizer)
    rate.fill_(0.2)
    assert numbers(optimizer) != before


def test_signatures_tell_shapes_apart_and_not_values() -> None:
    def of(value: Any) -> Any:
        return signature(value, [])

    assert of((torch.zeros(2), None)) == of((torch.ones(2), None))
    assert of((torch.zeros(2), None)) != of((torch.zeros(3), None))
    assert of((torch.zeros(2), None)) != of((torch.zeros(2), torch.zeros(1)))
    images = torch.zeros(2, 3, 4, 4)
    assert of(images) != of(images.contiguous(memory_format=torch.channels_last))


# -- torch.compile -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_run() -> None:
    """Within rounding: losses step by step, and nearly all hits."""
    spec = RunSpec(
        method="er", scenario="split-digits", scenario_params={"per_class": 24}, epochs=1, eval_every=2,
        eval_per_group=20, device="cpu", backbone="mlp",
    )  # fmt: skip
    plain = finished(spec)
    for changes in ({"compile": True}, {"compile": True, "evaluator": "snapshot"}):
        compiled = finished(spec.model_copy(update=changes))
        assert compiled.method.backbone._compiled_call_impl is not None
        _, _, expected = plain.losses.table()
        _, _, got = compiled.losses.table()
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)
        hits, others = plain.evaluator.drain()["hits"], compiled.evaluator.drain()["hits"]
        assert int((hits - others).abs().sum()) <= 0.01 * int(hits.sum())


# -- on the device -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["finetune", "er", "joint"])
def test_graphed_steps_on_the_device_end_with_the_same_weights(name: str) -> None:
    from clbench.learner.run import exact_arithmetic

    spec = RunSpec(
        method=name, scenario="split-digits", scenario_params={"per_class": 60}, epochs=3, eval_every=0, device="cuda",
        set={"momentum": 0.9},
    )  # fmt: skip
    with exact_arithmetic(torch.device("cuda")):
        plain = finished(spec)
        graphed = finished(spec.model_copy(update={"cuda_graph": True}))
    assert weights(plain) == weights(graphed)
    assert equal(plain.losses.state_dict(), graphed.losses.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_a_rate_that_changes_between_replays(place: str) -> None:
    """On the device it is read at every launch, on the host it makes another graph."""
    rates = [0.1] * 6 + [0.01] * 6
    spec = RunSpec(
        method="finetune", scenario="split-digits", scenario_params={"per_class": 60}, epochs=3, eval_every=0,
        device="cuda",
    )  # fmt: skip
    ended = []
    for graphed in (False, True):
        learner = prepared(spec)
        method = learner.method
        plan = learner.plans()[0][0]
        method.open_phase(learner.scenario.tasks[0], plan.phase, learner.at)
        rate = torch.tensor(0.1, device=place)
        method.optimizer.param_groups[0]["lr"] = rate if graphed else 0.1
        step = GraphedStep(method, torch.device("cuda")) if graphed else method.step
        batch = learner.stream.batch(plan, learner.at)
        for value in rates:
            rate.fill_(value)
            if not graphed:
                method.optimizer.param_groups[0]["lr"] = value
            step(batch)
        ended.append(weights_of(method))
    assert ended[0].keys() == ended[1].keys()
    for name, value in ended[0].items():
        torch.testing.assert_close(ended[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_graphed_adam_on_the_device() -> None:
    spec = RunSpec(
        method="er", scenario="split-digits", scenario_params={"per_class": 60}, epochs=3, eval_every=0, device="cuda",
        set={"optimizer": "adam", "lr": 0.001},
    )  # fmt: skip
    plain, graphed = finished(spec), finished(spec.model_copy(update={"cuda_graph": True}))
    _, _, expected = plain.losses.table()
    _, _, got = graphed.losses.table()
    torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(expected), rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
def test_a_replayed_step_never_waits_for_the_device() -> None:
    spec = RunSpec(
        method="finetune", scenario="split-digits", scenario_params={"per_class": 60}, epochs=3, eval_every=0,
        device="cuda",
    )  # fmt: skip
    learner = prepared(spec)
    plan = learner.plans()[0][0]
    learner.method.open_phase(learner.scenario.tasks[0], plan.phase, learner.at)
    step = GraphedStep(learner.method, torch.device("cuda"))
    batch = learner.stream.batch(plan, learner.at)
    for _ in range(5):
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            losses = step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.replayed >= 5
    assert bool(torch.isfinite(losses["loss"]))
