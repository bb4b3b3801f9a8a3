"""CLIB: the t-test on the device against scipy, the learning rate against a plain loop, CutMix, and the method."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import Flat, assert_survives_kill, equal, learner_for, make_store, outcome, run, split_scenario
from torch import Tensor

from clbench.errors import InputError
from clbench.learner.graphed_step import check_graphable
from clbench.learner.hostreads import forbid_host_reads
from clbench.learner.learner import Learner
from clbench.memory.importance import ImportanceMemory
from clbench.methods._adaptive_rate import AdaptiveRate, student_tail, welch_p_value
from clbench.methods._cutmix import cutmix, partners
from clbench.methods._importance_replay import ImportanceReplay, Prepared
from clbench.methods.clib import METHOD as CLIB
from clbench.rng import generator
from clbench.stream.types import Batch

SMALL = {"capacity": 8, "replay_batch_size": 4, "lr_period": 1, "lr_length": 3}


def learner(scenario=None, **changes) -> Learner:
    return learner_for(scenario or split_scenario(make_store()), CLIB, config=CLIB.Config(**{**SMALL, **changes}))


# -- the t-test ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("df", [2.0, 3.3, 9.0, 14.7, 18.0, 60.0])
@pytest.mark.parametrize("t", [-40.0, -3.0, -0.2, 0.0, 0.7, 1.812, 5.0, 80.0])
def test_tail_of_student(t: float, df: float) -> None:
    p = student_tail(torch.tensor(t, dtype=torch.float64), torch.tensor(df, dtype=torch.float64))
    assert float(p) == pytest.approx(stats.t.sf(t, df), abs=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=10, max_size=10), st.lists(st.floats(-10, 10), min_size=10, max_size=10))
@settings(max_examples=60, deadline=None)
def test_welch_is_scipys(a: list[float], b: list[float]) -> None:
    if min(torch.tensor(a).var(), torch.tensor(b).var()) < 1e-6:
        return  # scipy warns, and compares rounding with rounding
    expected = stats.ttest_ind(a, b, equal_var=False, alternative="greater").pvalue
    p = welch_p_value(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert float(p) == pytest.approx(expected, abs=1e-9)


def test_no_spread_decides_nothing() -> None:
    p = welch_p_value(torch.ones(5), torch.zeros(5))
    assert math.isnan(float(p))


# -- the learning rate -----------------------------------------------------------------------------------------------
def plain_rates(falls: list[float], rate: float, step: float, period: int, length: int) -> list[float]:
    """hle card 1.5, as the code of CLIB runs it: the rate in use behind each refresh. falls: of the mean loss."""
    high, low, is_high, known, before, out = rate, step * rate, True, {True: [], False: []}, None, []
    used, loss = rate, 0.0
    for count, fall in enumerate(falls, start=1):
        loss -= fall
        if count % period == 0:
            if before is not None and count > 20:
                known[is_high] = [*known[is_high], before - loss][-length:]
            before, is_high = loss, not is_high
            if len(known[True]) == len(known[False]) == length:
                p = stats.ttest_ind(known[False], known[True], equal_var=False, alternative="greater").pvalue
                if p < 0.05 or p > 0.95:
                    high, low = (low, low * step) if p < 0.05 else (high / step, high)
                    known, is_high = {True: [], False: []}, not is_high
            used = high if is_high else low
        out.append(used)
    return out


@pytest.mark.parametrize(("favoured", "direction"), [(False, -1), (True, 1), (None, 0)])
def test_the_better_rate_wins(favoured: bool | None, direction: int) -> None:
    memory = ImportanceMemory(4, 2)
    memory.add(torch.arange(4), torch.tensor([0, 1, 0, 1]))
    rate = AdaptiveRate(0.1, memory, step=0.5, period=2, length=4)
    noise = torch.randn(160, generator=generator(1, "noise"), dtype=torch.float64) * 0.01
    falls, used, loss = [], [], torch.full((4,), 50.0, dtype=torch.float64)
    with forbid_host_reads():
        for index in range(160):
            gain = 0.1 * (rate.high == favoured) if favoured is not None else 0.0
            falls.append(noise[index] + gain)
            loss = loss - falls[-1]
            memory.refresh(loss)
            rate.refreshed()
            used.append(rate.rate.clone())
    expected = plain_rates(torch.stack(falls).tolist(), 0.1, 0.5, 2, 4)
    assert torch.stack(used).tolist() == pytest.approx(expected, rel=1e-6)
    if direction:
        assert (max(expected) > 0.15, min(expected) < 0.04) == (direction > 0, direction < 0)


def test_new_exemplars_do_not_count_as_a_fall() -> None:
    memory = ImportanceMemory(2, 1)
    memory.add(torch.tensor([0, 1]), torch.tensor([0, 0]))
    rate = AdaptiveRate(0.1, memory, period=1, length=3)
    for step in range(22):
        if step == 21:
            memory.add(torch.tensor([7]), torch.tensor([0]))  # takes slot 0
        memory.refresh(torch.tensor([500.0 if step == 21 else 5.0, 5.0 - step]))
        rate.refreshed()
    assert rate.falls.max() == 1.0
    assert rate.falls.min() == 0.0


def test_the_optimiser_follows_the_tensor() -> None:
    """With the rate at 0 nothing moves."""
    made = learner(cutmix=0.0)
    made.method.rate.rate.zero_()
    made.method.rate.refreshed = lambda: None
    before = made.method.classifier.weight.clone()
    run(made)
    assert torch.equal(made.method.classifier.weight, before)


# -- CutMix ----------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=20), st.integers(0, 2**31))
def test_partners_stay_in_their_group(groups: list[int], seed: int) -> None:
    group = torch.tensor(groups)
    partner = partners(group, generator(seed, "test"))
    assert torch.equal(group[partner], group)
    assert sorted(partner.tolist()) == list(range(len(groups)))


@pytest.mark.parametrize("seed", range(8))
def test_a_box_is_pasted_and_its_area_is_what_is_missing(seed: int) -> None:
    images = torch.arange(5.0)[:, None, None, None].expand(5, 2, 8, 12).contiguous()
    with forbid_host_reads():
        mixed = cutmix(images, torch.zeros(5, dtype=torch.int64), 1.0, generator(seed, "test"))
    for index in range(5):
        own = mixed.images[index] == index
        if mixed.partner[index] != index:
            assert own.float().mean() == pytest.approx(float(mixed.share))
            assert torch.all(mixed.images[index][~own] == mixed.partner[index])
    # what is pasted is one box
    pasted = mixed.images[int((mixed.partner != torch.arange(5)).int().argmax())][0]
    other = pasted != int((mixed.partner != torch.arange(5)).int().argmax())
    if other.any():
        rows, columns = other.any(1).nonzero()[:, 0], other.any(0).nonzero()[:, 0]
        assert int(other.sum()) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)


def test_without_cutmix_images_stay() -> None:
    images = torch.rand(4, 1, 6, 6)
    mixed = cutmix(images, torch.zeros(4, dtype=torch.int64), 0.0, generator(0, "test"))
    assert torch.equal(mixed.images, images)
    assert mixed.share == 1


# -- the method ------------------------------------------------------------------------------------------------------
def test_trains_on_the_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update sees the images of exemplars held at that time, as many as asked for, whatever the stream brings."""
    made, sizes = learner(cutmix=0.0, capacity=3, importance_every=1000), []

    def watched(self: CLIB, images: Tensor, targets: Tensor, batch: Batch) -> Prepared:
        held = self.setting.read(self.memory.rows, None, "test")
        assert all((held == image).flatten(1).all(1).any() for image in images)
        assert set(targets.tolist()) <= set(self.memory.targets.tolist())
        sizes.append(len(images))
        return ImportanceReplay.prepared(self, images, targets, batch)

    monkeypatch.setattr(CLIB, "prepared", watched)
    run(made)
    assert sizes == [3] * made.at.step


def test_importance_is_refreshed_as_often_as_asked() -> None:
    made, times = learner(importance_every=3), []
    refresh = made.method.memory.refresh
    made.method.memory.refresh = lambda losses: times.append(made.method.updates) or refresh(losses)
    run(made)
    assert times == list(range(3, made.at.step + 1, 3))
    assert made.method.memory.importance.abs().max() > 0


def test_the_learning_rate_clock() -> None:
    """Per update every refresh counts; per batch only those behind the last update on it."""
    counts = {}
    for clock in ("update", "batch"):
        made = learner(lr_clock=clock, importance_every=2)
        made.stream.updates = 3
        run(made)
        counts[clock] = made.method.rate.count
    steps = made.at.step
    assert counts["update"] == steps // 2
    assert counts["batch"] == steps // 6


def test_survives_a_kill() -> None:
    whole = assert_survives_kill(partial(learner_for, split_scenario(make_store()), CLIB, config=CLIB.Config(**SMALL)))
    assert whole.method.rate.known.sum() > 0 or whole.method.rate.rate < 3e-4


def test_an_online_stream_is_stored_once_and_survives_a_kill() -> None:
    scenario = split_scenario(make_store(), online=True)
    make = partial(learner_for, scenario, CLIB, config=CLIB.Config(**SMALL, optimizer="sgd", momentum=0.5))
    whole = assert_survives_kill(make, at_most=4)
    assert whole.method.memory.num_seen == scenario.offsets[-1]


def test_the_update_may_be_captured() -> None:
    """Its parts from inputs that stay where they are, as a CUDA graph has them, give the same run."""
    check_graphable(CLIB, "it")
    plain, captured = learner(importance_every=2), learner(importance_every=2)
    captured.cuda_graph = True
    assert equal(outcome(run(plain)), outcome(run(captured)))


def test_memory_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="clib trains on its memory, but capacity is 0"):
        learner(capacity=0)


def test_cutmix_needs_images() -> None:
    with pytest.raises(InputError, match="set cutmix=0, or train=all"):
        learner(train="head")


@pytest.mark.parametrize("capacity", [1, 10_000])
def test_any_capacity_works(capacity: int) -> None:
    """One exemplar, and more than there are samples."""
    made = run(learner(capacity=capacity))
    assert len(made.method.memory) == min(capacity, made.scenario.offsets[-1])


def test_unseen_classes_get_no_gradient() -> None:
    made = learner(cutmix=0.0)
    seen = torch.tensor([True, True, False, False, False, False])
    logits = made.method.classifier(made.method.features(torch.rand(4, 1, 6, 6), None))
    made.method.sample_losses(logits, torch.tensor([0, 1, 0, 1]), seen).sum().backward()
    assert made.method.classifier.weight.grad[2:].abs().max() == 0


def test_kept_features_are_enough_for_the_head() -> None:
    made = learner_for(split_scenario(make_store()), CLIB, config=CLIB.Config(**SMALL, train="head", cutmix=0.0))
    network = Flat()
    network.load_state_dict(made.method.backbone.state_dict())
    reader = made.stream.read

    def features(rows: Tensor, domain: Tensor | None) -> Tensor:
        with torch.no_grad():
            return network(reader(rows, domain, "test"))

    reader.features = features
    run(made)
    assert torch.equal(made.method.backbone.layer.weight, network.layer.weight)
    assert made.method.memory.loss.min() > 0
