"""GDumb: the schedule against torch's, what is trained on and how often, and both learners."""

from functools import partial

import pytest
import torch
from tiny import PER_CLASS, assert_survives_kill, learner_for, make_store, run, split_scenario
from torch import Tensor, nn

from clbench.evaluator import Schedule
from clbench.learner.learner import Learner
from clbench.methods.gdumb import LEARNERS, warm_restart_rate
from clbench.methods.gdumb import METHOD as GDUMB
from clbench.stream.types import Batch, Cursor


def tiny(*, online: bool = True, **options: object) -> Learner:
    changes = {key: options.pop(key) for key in list(options) if key not in ("save", "checkpoint_steps", "schedule")}
    config = GDUMB.Config(**{"capacity": 20, "passes": 3, **changes})
    scenario = split_scenario(make_store(), online=online)
    return learner_for(scenario, GDUMB, config=config, views={"train": "flip", "test": ""}, **options)


def weights(learner: Learner) -> list[Tensor]:
    return [value.clone() for module in learner.method.modules() for value in module.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rate_is_torchs_schedule_as_the_official_code_steps_it() -> None:
    """Pass 0 at a tenth, pass 1 at the top without a step of the scheduler, then one step ahead of each pass."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=0.0005)
    expected = [0.005, 0.05]
    optimizer.step()
    for _ in range(2, 256):
        schedule.step()
        expected.append(optimizer.param_groups[0]["lr"])
    got = [warm_restart_rate(epoch, 0.05, 0.0005) for epoch in range(256)]
    assert got == pytest.approx(expected, abs=1e-12)
    assert got.count(0.05) == 8  # passes 1, 2, 4, ..., 128


def test_the_stream_teaches_nothing_and_training_begins_at_the_start() -> None:
    learner = tiny(schedule=Schedule(0), lr=0.0)
    method = learner.method
    start = weights(learner)
    for value in method._weights():
        value.mul_(2)  # as if something had been learned
    changed = weights(learner)
    plans, task = learner.plans()[0], learner.scenario.tasks[0]
    method.begin_phase(task, plans[0].phase, Cursor(0, 0, 0, 0, 0))
    for iteration in range(plans[0].iterations):
        assert not method.step(learner.stream.batch(plans[0], Cursor(0, 0, iteration, 0, iteration)))
    assert same(changed, weights(learner))
    assert len(method.buffer) > 0
    method.begin_phase(task, plans[1].phase, Cursor(0, 1, 0, 0, 5))
    assert same(start, weights(learner))
    run(learner)  # lr 0: what a run ends with is where it started
    assert same(start, weights(learner))


@pytest.mark.parametrize("name", ["official", "raptormai"])
def test_each_pass_takes_every_exemplar_once(name: str) -> None:
    """official keeps the ragged last batch, raptormai drops it; a memory with room ends early."""
    learner = tiny(learner=name, capacity=100, memory_batch_size=7, schedule=Schedule(0), fit="last")
    drawn: list[Tensor] = []
    take = learner.method.buffer.take
    learner.method.buffer.take = lambda slots: (drawn.append(slots), take(slots))[1]
    run(learner)
    held = len(learner.method.buffer)
    assert held == 72
    per_pass = held // 7 + (name == "official" and held % 7 > 0)
    assert len(drawn) == 3 * per_pass
    for epoch in range(3):
        slots = torch.cat(drawn[epoch * per_pass : (epoch + 1) * per_pass])
        assert len(slots.unique()) == len(slots) == (held if name == "official" else held // 7 * 7)
    steps, _, _ = learner.losses.table()
    assert len(steps) == len(drawn)
    room = learner.plans()[-1][1].iterations
    assert room == 3 * (100 // 7 + (name == "official"))
    assert learner.at.step == sum(plan.steps for plans in learner.plans() for plan in plans)


def test_fewer_exemplars_than_a_batch_still_train() -> None:
    learner = run(tiny(learner="raptormai", capacity=3, schedule=Schedule(0), fit="last"))
    steps, _, _ = learner.losses.table()
    assert len(steps) == 3


def test_fit_says_when() -> None:
    every, last = tiny(), tiny(fit="last")
    assert [[p.phase.name for p in plans] for plans in every.plans()] == [["collect", "memory"]] * 3
    assert [len(plans) for plans in last.plans()] == [1, 1, 2]
    for learner in (every, last):
        run(learner)
    assert every.method.fits == 3
    assert last.method.fits == 1


def test_epochs_of_the_scenario_do_not_repeat_the_collection() -> None:
    learner = run(tiny(online=False, schedule=Schedule(0)))
    assert learner.method.buffer.num_seen == 6 * PER_CLASS
    assert [plans[0].iterations for plans in learner.plans()] == [5, 5, 5]


def test_gradients_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain SGD: no step is longer than rate x clip."""
    learner = tiny(learner="raptormai", lr=0.5, clip=0.01, schedule=Schedule(0), passes=1, fit="last")
    method, step, lengths = learner.method, torch.optim.SGD.step, []

    def watched(self: torch.optim.SGD, *args: object) -> None:
        before = [p.detach().clone() for p in method._parameters()]
        step(self, *args)
        moved = [(p - b).square().sum() for p, b in zip(method._parameters(), before, strict=True)]
        lengths.append(float(sum(moved).sqrt().detach()))

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    run(learner)
    assert max(lengths) == pytest.approx(0.005, rel=1e-4)


@pytest.mark.parametrize("name", ["official", "raptormai"])
def test_survives_a_kill_and_learns(name: str) -> None:
    whole = assert_survives_kill(partial(tiny, learner=name, passes=8, capacity=30, lr=0.2), at_most=6)
    assert whole.matrix[-1][1].sum() > 2 * 36 / 6, "no better than chance"


def test_features_rest_while_the_stream_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = [], GDUMB.step

    def watched(self: GDUMB, batch: Batch) -> object:
        seen.append((batch.phase.name, self.features_version))
        return step(self, batch)

    monkeypatch.setattr(GDUMB, "step", watched)
    run(tiny())
    assert {version for name, version in seen if name == "memory"} == {None}
    assert sorted({version for name, version in seen if name == "collect"}) == [0, 1, 2]


def test_given_values_replace_the_learners() -> None:
    assert GDUMB.Config().recipe() == LEARNERS["official"]
    changed = GDUMB.Config(learner="raptormai", passes=70, cutmix=0.0).recipe()
    assert changed == LEARNERS["raptormai"]._replace(passes=70)
    assert GDUMB.Config(momentum=0.0).recipe().momentum == 0.0
