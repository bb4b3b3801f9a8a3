"""SHARP against the official vectors, against slow retellings, and the invariants of its card (section 7)."""

import io
import itertools
import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Flat, assert_survives_kill, learner_for, make_store, run, split_scenario
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clbench import backbones
from clbench.backbones.sharp_networks import StagedNetwork, mnistlike
from clbench.errors import InputError
from clbench.evaluator import Schedule
from clbench.learner.learner import Learner
from clbench.methods import sharp as sharp_module
from clbench.methods._activations import ActivationMemory, dequantise, draw_replay, quantise, replay_counts
from clbench.methods._class_vectors import ClassVectors
from clbench.methods._sparse import drop, grow, most_active, promote, redraw_std, select, source_ages
from clbench.methods.config import make_config
from clbench.methods.registry import find as find_method
from clbench.methods.registry import find_recipe
from clbench.methods.sharp import (
    SHARP,
    SHARPConfig,
    age_mask,
    has_partner,
    phase_lengths,
    replayed_episodes,
    selection_percent,
    supcon_loss,
    tau,
)
from clbench.rng import generator
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "sharp.json").read_text())["vectors"]


def vector(start: str, number: int = 0) -> dict[str, Any]:
    return [v for v in VECTORS if v["what"].startswith(start)][number]


# -- parity with the official code -----------------------------------------------------------------------------------
def test_tau_schedule() -> None:
    case = vector("tau schedule")
    period = case["inputs"]["k"]
    found = [tau(t, period) for t in case["inputs"]["t"]]
    assert found == pytest.approx(case["expected"]["tau"], abs=1e-12)
    percents = [selection_percent(phase, period, 60.0) for phase in range(1, 16)]
    expected = [max(100 * case["expected"]["tau"][max(2, phase)], 60) for phase in range(1, 16)]
    assert percents == pytest.approx(expected, abs=1e-9)
    assert percents[0] == percents[1]


@pytest.mark.parametrize("number", [0, 1])
def test_most_active_units(number: int) -> None:
    case = vector("pick units", number)
    picked = most_active(torch.tensor(case["inputs"]["activation"]), case["inputs"]["percent"])
    assert picked.tolist() == case["expected"]["picked_in_order"]


def layers_of(case: dict[str, Any], block: int) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Mask, source ages, target ages and kernel area of every layer of a vector."""
    ages = [torch.tensor(a) for a in case["inputs"]["unit_types"]]
    out = []
    for index, before in enumerate(case["inputs"]["connectivity_before"]):
        mask = torch.tensor(before).bool()
        conv = index < 2
        sources = source_ages(ages[index], block if index == 2 else 1)
        out.append((mask, sources, ages[index + 1], 9 if conv else 1))
    return out


def test_drop() -> None:
    case = vector("drop step")
    expected = case["expected"]
    for index, (mask, sources, targets, area) in enumerate(layers_of(case, case["inputs"]["conv2lin_block"])):
        dropped = drop(mask, sources, targets)
        assert dropped.int().tolist() == expected["drop_masks"][index]
        assert (mask & ~dropped).int().tolist() == expected["connectivity_after"][index]
        assert int(dropped.sum()) * area == expected["drop_counts_scalar_weights"][index]


def test_grow_with_more_quota_than_slots() -> None:
    case = vector("grow step")
    for index, (mask, _, targets, area) in enumerate(layers_of(case, 4)):
        quota = case["inputs"]["quota"][index]
        grown, left = grow(mask, targets, quota, area, generator(0, "grow"))
        expected = torch.tensor(case["expected"]["connectivity_after"][index]).bool()
        assert left == case["expected"]["remainder"][index]
        assert grown.sum() == expected.sum()
        if index != 2:  # that layer has more slots than its quota: drawn
            assert torch.equal(grown, expected)


def test_units_that_knew_a_class() -> None:
    case = vector("LTM unit mask")
    ages = torch.tensor(case["inputs"]["penultimate_types"])
    assert age_mask(ages, 2).nonzero()[:, 0].tolist() == case["expected"]["units_ge2"]
    assert age_mask(ages, 3).nonzero()[:, 0].tolist() == case["expected"]["units_ge3"]
    assert age_mask(ages, 9).all()


def test_supcon_loss_and_gradient() -> None:
    case = vector("single-view")["inputs"]
    expected = vector("single-view")["expected"]
    features = torch.tensor(case["features"], dtype=torch.float64, requires_grad=True)
    loss = supcon_loss(features, torch.tensor(case["labels"]), case["temperature"])
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, torch.tensor(expected["grad"], dtype=torch.float64), atol=1e-5, rtol=0)


def test_replay_shares_and_episodes() -> None:
    case = vector("replay batch")
    for (num, episodes), counts in zip(case["inputs"]["cases"], case["expected"]["counts"], strict=True):
        classes = [c for e in episodes for c in case["inputs"]["task2classes"][str(e)]]
        assert replay_counts(num, len(classes)) == counts
    case = vector("episodes replayed")
    for recent, episode, expected in zip(
        case["inputs"]["stm_num_tasks"], case["inputs"]["e"], case["expected"]["one_based_episodes"], strict=True
    ):
        assert [e + 1 for e in replayed_episodes(episode, recent)] == expected


def test_redraw_std() -> None:
    case = vector("re-initialisation")
    found = [redraw_std(n, a) for n, a in zip(case["inputs"]["n_plastic"], case["inputs"]["kernel_area"], strict=True)]
    assert found == pytest.approx(case["expected"]["std"], abs=1e-12)


def test_every_vector_is_used() -> None:
    assert len(VECTORS) == 10


# -- units and connections -------------------------------------------------------------------------------------------
@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20), st.floats(1, 100))
@settings(deadline=None)
def test_most_active_is_the_shortest_prefix(activity: list[float], percent: float) -> None:
    values = torch.tensor(activity, dtype=torch.float64)
    picked = most_active(values, percent)
    assert len(set(picked.tolist())) == len(picked) >= 1
    assert (values[picked].diff() <= 0).all()
    rest = values[[i for i in range(len(values)) if i not in picked.tolist()]]
    assert len(rest) == 0 or rest.max() <= values[picked].min()
    needed = values.sum() * percent / 100
    assert values[picked[:-1]].sum() < needed or len(picked) == 1
    assert values[picked].sum() >= needed * (1 - 1e-12)


ages_of = partial(st.lists, st.integers(0, 4), min_size=1, max_size=9)


@given(ages_of(), st.data())
@settings(deadline=None)
def test_selection_moves_plastic_and_learning_units_alone(values: list[int], data: st.DataObject) -> None:
    ages = torch.tensor(values)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(values) - 1), unique=True)), dtype=torch.int64)
    after = select(ages, chosen)
    assert torch.equal(after[ages >= 2], ages[ages >= 2])
    for unit in range(len(values)):
        if values[unit] < 2:
            assert after[unit] == int(unit in chosen.tolist())  # a learner may be demoted
    assert torch.equal(promote(after) > 0, after > 0)
    assert torch.equal(promote(after)[after > 0], after[after > 0] + 1)


@given(ages_of(), ages_of(), st.sampled_from([1, 9]), st.integers(0, 10**6))
@settings(deadline=None)
def test_drop_and_grow_keep_the_number_of_connections(
    sources: list[int], targets: list[int], area: int, seed: int
) -> None:
    below, above = torch.tensor(sources), torch.tensor(targets)
    mask = torch.rand((len(targets), len(sources)), generator=generator(seed, "mask")) < 0.5
    dropped = drop(mask, below, above)
    kept = mask & ~dropped
    assert not (kept & (below == 0)[None] & (above != 0)[:, None]).any()
    quota = int(dropped.sum()) * area
    grown, left = grow(kept, above, quota, area, generator(seed, "grow"))
    new = grown & ~kept
    assert (kept <= grown).all()
    assert not new[above != 0].any(), "only plastic units get new inputs"
    assert int(new.sum()) * area + left == quota
    assert left == 0 or grown[above == 0].all(), "density falls only when all places are taken"
    assert not drop(grown, below, above).any()


def test_growth_is_uniform() -> None:
    mask = torch.zeros((2, 5), dtype=torch.bool)
    mask[0, 0] = True
    times = torch.zeros(2, 5)
    for seed in range(600):
        grown, left = grow(mask, torch.tensor([0, 1]), 2, 1, generator(seed, "grow"))
        assert left == 0
        times += (grown & ~mask).float()
    assert times[1].sum() == times[0, 0] == 0
    assert (times[0, 1:] - 300).abs().max() < 60  # 600 * 2 / 4, five standard deviations


# -- loss ------------------------------------------------------------------------------------------------------------
def slow_supcon(features: Tensor, labels: list[int], temperature: float) -> Tensor:
    unit = features / features.norm(dim=1, keepdim=True)
    terms = []
    for i, label in enumerate(labels):
        partners = [j for j in range(len(labels)) if j != i and labels[j] == label]
        if partners:
            scores = unit @ unit[i] / temperature
            total = torch.stack([scores[k] for k in range(len(labels)) if k != i]).logsumexp(0)
            terms.append(-torch.stack([scores[j] - total for j in partners]).mean())
    return torch.stack(terms).mean() if terms else torch.zeros(())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=10), st.integers(0, 99), st.sampled_from([0.05, 0.1, 1.0]))
@settings(deadline=None)
def test_supcon_is_the_cards(labels: list[int], seed: int, temperature: float) -> None:
    features = torch.randn((len(labels), 4), generator=generator(seed, "z"), dtype=torch.float64)
    found = supcon_loss(features, torch.tensor(labels), temperature)
    torch.testing.assert_close(found, slow_supcon(features, labels, temperature).double(), atol=1e-9, rtol=1e-9)


def test_singletons_of_the_batch_are_not_there_at_all() -> None:
    """Step a of the card removes them from the batch, so they are no negatives either; a replayed one stays."""
    labels = torch.tensor([0, 0, 7, 1, 1, 5])
    features = torch.randn((6, 4), generator=generator(0, "z"), dtype=torch.float64, requires_grad=True)
    keep = torch.cat([has_partner(labels[:5]), torch.tensor([True])])  # the last one is replayed
    assert keep.tolist() == [True, True, False, True, True, True]
    loss = supcon_loss(features, labels, 0.1, keep)
    torch.testing.assert_close(loss, supcon_loss(features[keep], labels[keep], 0.1))
    loss.backward()
    assert features.grad is not None
    assert (features.grad[2] == 0).all()
    assert (features.grad[5] != 0).any()


def test_no_pair_at_all_gives_no_gradient_and_no_nan() -> None:
    features = torch.randn((3, 4), generator=generator(0, "z"), requires_grad=True)
    loss = supcon_loss(features, torch.tensor([0, 1, 2]), 0.05)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert (features.grad == 0).all()
    dead = torch.zeros((4, 3), requires_grad=True)  # no unit of any sample is active
    supcon_loss(dead, torch.tensor([0, 0, 1, 1]), 0.1).backward()
    assert dead.grad is not None
    assert dead.grad.isfinite().all()


# -- activation memory -----------------------------------------------------------------------------------------------
def test_codes_round_half_to_even() -> None:
    values = torch.tensor([0.0, 0.5, 1.5, 2.5, 255.0])
    codes, ranges = quantise(values)
    assert codes.tolist() == [0, 0, 2, 2, 255]
    assert ranges.tolist() == [0.0, 255.0]


@given(st.integers(0, 999), st.floats(0.01, 100))
@settings(deadline=None)
def test_a_code_is_off_by_half_a_step_at_most(seed: int, scale: float) -> None:
    values = torch.randn((5, 2, 3, 3), generator=generator(seed, "v")).relu() * scale
    codes, ranges = quantise(values)
    back = dequantise(codes, ranges.expand(5, 2))
    step = (ranges[1] - ranges[0]) / 255
    assert (back - values).abs().max() <= step * 0.501
    assert back.amin() == ranges[0]
    torch.testing.assert_close(back.amax(), ranges[1])


def test_equal_activations_are_stored_as_they_are() -> None:
    codes, ranges = quantise(torch.full((3, 1, 2, 2), 4.5))
    assert (dequantise(codes, ranges.expand(3, 2)) == 4.5).all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 999))
@settings(deadline=None)
def test_replay_draws(available: list[int], num: int, seed: int) -> None:
    which, place = draw_replay(torch.tensor(available), 6, num, generator(seed, "replay"))
    counts = [int((which == c).sum()) for c in range(len(available))]
    assert counts == replay_counts(num, len(available))
    assert sum(counts) == num
    for c, count in enumerate(counts):
        places = place[which == c].tolist()
        assert all(0 <= p < available[c] for p in places)
        if count <= available[c]:
            assert len(set(places)) == count, "without replacement"


def test_replay_draws_are_uniform() -> None:
    times = torch.zeros(2, 4)
    for seed in range(500):
        which, place = draw_replay(torch.tensor([4, 3]), 4, 10, generator(seed, "replay"))  # 5 of 4, 5 of 3
        times.index_put_((which, place), torch.ones(10), accumulate=True)
        which, place = draw_replay(torch.tensor([4, 3]), 4, 4, generator(seed, "fewer"))  # 2 of 4, 2 of 3
        times.index_put_((which, place), torch.ones(4), accumulate=True)
    assert times[1, 3] == 0
    assert (times[0] / times[0].sum() - 1 / 4).abs().max() < 0.03
    assert (times[1, :3] / times[1].sum() - 1 / 3).abs().max() < 0.03


def test_a_class_has_one_entry_its_newest() -> None:
    memory = ActivationMemory(3, (1, 2, 2), torch.device("cpu"))
    first, again = torch.rand(5, 1, 2, 2), torch.rand(2, 1, 2, 2)
    memory.store(7, 0, first)
    memory.store(4, 0, torch.rand(3, 1, 2, 2))
    torch.testing.assert_close(memory.of_class(7), first[:3], atol=1 / 500, rtol=0)
    memory.store(7, 1, again)
    assert memory.labels.tolist() == [4, 7]
    torch.testing.assert_close(memory.of_class(7), again, atol=1 / 500, rtol=0)
    memory.keep([1])
    assert memory.labels.tolist() == [7]
    drawn, labels = memory.draw(6, generator(0, "draw"))
    assert labels.tolist() == [7] * 6
    assert drawn.shape == (6, 1, 2, 2)
    assert memory.num_bytes() == 3 * 4 + 2 * 4
    memory.keep([])
    assert len(memory) == 0


# -- answers ---------------------------------------------------------------------------------------------------------
def slow_predict(
    queries: Tensor, stored: list[tuple[int, Tensor, Tensor]], allowed: Tensor, num: int
) -> tuple[list[int], Tensor]:
    """The card's prediction class by class and sample by sample; stored: label, (k, D) raw vectors, (D,) bool units."""
    distances, labels = [], []
    for label, vectors, units in stored:
        if allowed[label]:
            own = F.normalize(vectors[:, units], dim=1)
            asked = F.normalize(queries[:, units], dim=1)
            distances.append((own[:, None] - asked[None]).square().sum(-1).sqrt())
            labels += [label] * len(vectors)
    together = torch.cat(distances)
    answers = []
    for sample in range(len(queries)):
        nearest = together[:, sample].topk(min(num, len(labels)), largest=False).indices
        answers.append(int(torch.tensor(labels)[nearest].mode().values))
    return answers, together


def memory_of(stored: list[tuple[int, Tensor, Tensor]], num_classes: int) -> ClassVectors:
    memory = ClassVectors(num_classes, torch.device("cpu"))
    for label, raw, units in stored:
        memory.store([raw], [label], units)
    return memory


@given(st.integers(0, 9999), st.integers(1, 7), st.booleans())
@settings(deadline=None)
def test_votes_are_those_of_the_per_class_loop(seed: int, num: int, together: bool) -> None:
    rng = generator(seed, "knn")
    stored = []
    shared = torch.rand(8, generator=rng) < 0.7
    for label in (4, 0, 1, 2):  # class 3 has no vectors yet
        raw = torch.randn((3 + (label == 2), 8), generator=rng, dtype=torch.float64).relu()
        units = shared if together else torch.rand(8, generator=rng) < 0.7
        stored.append((label, raw, units))
    queries = torch.randn((6, 8), generator=rng, dtype=torch.float64).relu()
    allowed = torch.rand(5, generator=rng) < 0.8
    memory = memory_of(stored, 5)
    if together:
        memory = ClassVectors(5, torch.device("cpu"))
        memory.store([raw for _, raw, _ in stored], [label for label, _, _ in stored], shared)
    votes = memory.votes(queries, allowed, num)
    assert votes.isfinite().all()
    assert (votes[:, ~allowed] == 0).all()
    if not allowed[[label for label, _, _ in stored]].any():
        assert (votes == 0).all()
        return
    answers, distances = slow_predict(queries, stored, allowed, num)
    assert (votes.sum(1) == min(num, len(distances))).all()
    for sample, answer in enumerate(answers):
        ordered = distances[:, sample].sort().values
        cut = min(num, len(ordered))
        if cut == len(ordered) or ordered[cut] - ordered[cut - 1] > 1e-7:  # else which one votes is open
            assert int(votes[sample].argmax()) == answer


def test_ties_go_to_the_lowest_class_and_masks_are_per_sample() -> None:
    full = torch.ones(2, dtype=torch.bool)
    stored = [
        (2, torch.tensor([[1.0, 0.2], [1.0, 0.3]]), full),
        (1, torch.tensor([[1.0, 0.1], [0.0, 1.0]]), full),
        (0, torch.tensor([[0.0, 1.0]]), full),
    ]
    memory = memory_of(stored, 3)
    query = torch.tensor([[2.0, 0.3]])
    votes = memory.votes(query, torch.ones(3, dtype=torch.bool), 2)
    assert votes.tolist() == [[0, 1, 1]]
    assert int(votes.argmax()) == 1
    allowed = torch.tensor([[True, True, True], [True, False, False]])
    assert memory.votes(query.expand(2, 2), allowed, 2).argmax(1).tolist() == [1, 0]


def test_only_the_units_of_a_class_count() -> None:
    units = torch.tensor([True, True, False])
    memory = memory_of([(0, torch.tensor([[1.0, 0.0, 9.0]]), units), (1, torch.tensor([[1.0, 1.0, 0.0]]), units)], 2)
    assert memory.votes(torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(2).bool(), 1).tolist() == [[1, 0]]


def test_storing_a_class_again_replaces_it() -> None:
    full, first = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, False])
    memory = ClassVectors(3, torch.device("cpu"))
    memory.store([torch.rand(2, 3), torch.rand(4, 3)], [0, 1], full)
    before = memory.num_bytes()
    memory.store([torch.rand(2, 3)], [1], first)
    assert [group["labels"].tolist() for group in memory.groups] == [[0, 0], [1, 1]]
    assert memory.num_bytes() < before  # 2 vectors on one unit in place of 4 on three
    memory.store([torch.rand(1, 3)] * 2, [0, 1], full)
    assert [group["labels"].tolist() for group in memory.groups] == [[0, 1]]


# -- networks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "shape", "options", "params", "activation", "block"),
    [
        ("mnistlike", (1, 28, 28), {}, 645_480, (16, 7, 7), 49),
        ("vgg-small", (3, 32, 32), {}, 3_629_376, (64, 8, 8), 16),
        ("vgg-small", (3, 32, 32), {"width": 2048}, 481_600 + 2 * (2048 * 2048 + 2048), (64, 8, 8), 16),
    ],
)
def test_networks_have_the_sizes_of_the_card(
    name: str,
    shape: tuple[int, int, int],
    options: dict[str, int],
    params: int,
    activation: tuple[int, ...],
    block: int,
) -> None:
    net = backbones.build(name, in_shape=shape, seed=0, options=options).net
    assert isinstance(net, StagedNetwork)
    assert sum(p.numel() for p in net.parameters()) == params
    assert net.activation_shape == activation
    assert max(net.inputs_per_unit) == block
    assert all(isinstance(layer, nn.Conv2d | nn.Linear) and (layer.bias == 0).all() for layer in net.layers)
    last = net.unit_layers[-1].weight
    assert float(last.detach().std()) == pytest.approx((2 / last.shape[1]) ** 0.5, rel=0.01)  # Kaiming, fan in
    images = torch.rand(2, *shape)
    hidden = net.early(images)
    assert hidden.shape == (2, *activation)
    assert torch.equal(net.from_early(hidden), net(images))


def test_the_first_linear_layer_reads_channels_in_blocks() -> None:
    net = mnistlike((1, 8, 8), 12)
    hidden = torch.zeros(1, 16, 2, 2)
    hidden[0, 3] = 1
    flat = hidden.flatten(1)[0]
    ages = torch.zeros(16, dtype=torch.int64)
    ages[3] = 1
    assert torch.equal(source_ages(ages, net.inputs_per_unit[2]), flat.long())


def test_activity_is_counted_behind_the_relu_and_ahead_of_pooling() -> None:
    net = mnistlike((1, 8, 8), 12)
    images = torch.rand(5, 1, 8, 8)
    first = F.relu(net.layers[0](images))
    second = F.relu(net.layers[1](F.max_pool2d(first, 2)))
    found = net.activity(images)
    assert [len(a) for a in found] == [16, 16, 12, 12]
    torch.testing.assert_close(found[0], first.double().sum((0, 2, 3)))
    torch.testing.assert_close(found[1], second.double().sum((0, 2, 3)))
    torch.testing.assert_close(found[3], net(images).double().sum(0))


# -- whole runs on tiny data -----------------------------------------------------------------------------------------
WIDTH = 48
NET = partial(mnistlike, (1, 6, 6), WIDTH)
SMALL = SHARPConfig(phase_epochs=1, stm_per_class=6, ltm_per_class=5, neighbours=3, min_activation=40.0, tau_period=6.0)
SELDOM = Schedule(7)
IMAGES = torch.rand((9, 1, 6, 6), generator=generator(5, "fixed images"))


class Net(nn.Module):
    """The network with what a backbone has."""

    def __init__(self, pretrained: bool = False) -> None:
        super().__init__()
        self.net = NET()
        self.num_features = WIDTH
        self.pretrained_on = ("tiny",) if pretrained else ()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def make(
    tasks: int = 5, num_classes: int = 10, config: SHARPConfig = SMALL, epochs: int = 3, net: Any = Net, **options: Any
) -> Learner:
    store = make_store(num_classes)
    scenario = split_scenario(store, tasks, setting=options.pop("setting", "class"))
    scenario = replace(scenario, defaults=replace(scenario.defaults, epochs=epochs, batch_size=8))
    return learner_for(scenario, SHARP, store=store, backbone=net, config=config, schedule=SELDOM, **options)


def episodes_of(config: SHARPConfig = SMALL, **options: Any) -> tuple[Learner, list[SHARP]]:
    """A finished run, and the method as it was behind each episode."""
    saved: list[bytes] = []

    def save(state: dict[str, Any]) -> None:
        file = io.BytesIO()
        torch.save(state["method"], file)
        saved.append(file.getvalue())

    learner = run(make(config=config, save=save, **options))
    methods = []
    for data in saved:  # one checkpoint behind each task
        method = make(config=config, **options).method
        assert isinstance(method, SHARP)
        method.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
        methods.append(method)
    assert len(methods) == len(learner.scenario.tasks)
    return learner, methods


@pytest.fixture(scope="module")
def history() -> list[SHARP]:
    return episodes_of()[1]


def vectors_of(method: SHARP, label: int) -> tuple[Tensor, Tensor]:
    """Units (n,) and stored vectors (k, n) of a class."""
    (group,) = (group for group in method.vectors.groups if label in group["labels"].tolist())
    return group["units"], group["vectors"][:, group["labels"] == label].T


def classes_with_vectors(method: SHARP) -> list[int]:
    return sorted({label for group in method.vectors.groups for label in group["labels"].tolist()})


def frozen(method: SHARP, index: int) -> Tensor:
    last = 1 if index < method.network.num_early else method.config.recent_episodes + 1
    return method.ages[index + 1] > last


def test_runs_reach_what_the_invariants_are_about(history: list[SHARP]) -> None:
    """Old, middle-aged and plastic units all exist, so that the tests below are not about empty sets."""
    final = history[-1].ages[-1]
    assert {0, 2, 3, 4, 6}.issubset(final.tolist())


def test_ages_never_fall_from_two_on(history: list[SHARP]) -> None:
    for before, after in itertools.pairwise(history):
        for old, new in zip(before.ages[1:], after.ages[1:], strict=True):
            assert torch.equal(new[old >= 2], old[old >= 2] + 1)
            assert set(new[old == 0].tolist()) <= {0, 2}
            assert not (new == 1).any()  # learners have been promoted
        assert (after.ages[0] == 99).all()


def test_frozen_weights_stay_to_the_bit(history: list[SHARP]) -> None:
    for before, after in itertools.pairwise(history):
        for index, (old, new) in enumerate(zip(before.network.unit_layers, after.network.unit_layers, strict=True)):
            rows = frozen(before, index)
            assert torch.equal(old.weight[rows], new.weight[rows])
            assert torch.equal(old.bias[rows], new.bias[rows])
            assert torch.equal(before.masks[index][rows], after.masks[index][rows])
        assert any(frozen(before, index).any() for index in range(4))


def test_what_learns_does_change(history: list[SHARP]) -> None:
    for before, after in itertools.pairwise(history):
        rows = (before.ages[-1] == 0) & (after.ages[-1] == 2)
        if rows.any():
            assert (before.network.unit_layers[-1].weight[rows] != after.network.unit_layers[-1].weight[rows]).any()
    middle = history[0].ages[-1] == 2  # replay holds them in place, and no more than that
    assert (
        history[0].network.unit_layers[-1].weight[middle] != history[1].network.unit_layers[-1].weight[middle]
    ).any()


def test_sources_of_a_unit_are_as_old_as_itself(history: list[SHARP]) -> None:
    for method in history:
        for index, mask in enumerate(method.masks):
            sources = source_ages(method.ages[index], method.network.inputs_per_unit[index])
            targets = method.ages[index + 1]
            old = targets >= 2
            assert (sources[None, :] >= targets[:, None])[old][mask[old]].all()
            cone = frozen(method, index)
            if index > 0:
                below = source_ages(frozen(method, index - 1).long(), method.network.inputs_per_unit[index]).bool()
                assert below.expand_as(mask)[cone][mask[cone]].all()


def test_old_units_answer_the_same_after_later_episodes(history: list[SHARP]) -> None:
    """To the bit, re-initialisation included; hence classes two episodes old keep their vectors and distances."""
    checked = 0
    for index, before in enumerate(history):
        old = before.ages[-1] >= 3
        for after in history[index + 1 :]:
            assert torch.equal(before.features(IMAGES, None)[:, old], after.features(IMAGES, None)[:, old])
            checked += int(old.sum())
            for label in range(2 * index):  # two classes per episode; those of the newest are rewritten once
                (units, vectors), (later_units, later_vectors) = vectors_of(before, label), vectors_of(after, label)
                assert torch.equal(units, later_units)
                assert torch.equal(vectors, later_vectors)
                assert (before.ages[-1][units] >= 3).all()
    assert checked > 0


def test_early_channels_that_are_frozen_stay_valid_for_stored_activations(history: list[SHARP]) -> None:
    for before, after in itertools.pairwise(history):
        old = before.ages[2] > 1
        assert old.any()
        assert torch.equal(before.network.early(IMAGES)[:, old], after.network.early(IMAGES)[:, old])


def grow_into_learners(
    connected: Tensor, targets: Tensor, quota: int, area: int, rng: torch.Generator
) -> tuple[Tensor, int]:
    return grow(connected, (targets > 1).long(), quota, area, rng)


@pytest.mark.parametrize("mistake", ["grow into learners", "drop nothing"])
def test_the_invariant_finds_wrong_implementations(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mistake == "grow into learners":
        monkeypatch.setattr(sharp_module, "grow", grow_into_learners)
    else:
        monkeypatch.setattr(sharp_module, "drop", lambda connected, sources, targets: torch.zeros_like(connected))
    wrong = episodes_of()[1]
    with pytest.raises(AssertionError):
        test_old_units_answer_the_same_after_later_episodes(wrong)


def test_redrawing_plastic_units_changes_no_other_units_output(history: list[SHARP]) -> None:
    for method in history:
        before, ages = method.features(IMAGES, None), method.ages[-1]
        weights = [layer.weight.detach().clone() for layer in method.network.unit_layers]
        with torch.no_grad():
            method._redraw_plastic(17)
        assert torch.equal(method.features(IMAGES, None)[:, ages != 0], before[:, ages != 0])
        for index, layer in enumerate(method.network.unit_layers):
            plastic, mask = method.ages[index + 1] == 0, method.masks[index]
            assert torch.equal(layer.weight[~plastic], weights[index][~plastic])
            assert (layer.bias[plastic] == 0).all()
            assert (layer.weight.flatten(2)[~mask] == 0).all() if layer.weight.ndim > 2 else True
            if plastic.any() and mask[plastic].any():
                assert (layer.weight[plastic] != weights[index][plastic]).any()


def test_density_is_kept_while_there_are_places(history: list[SHARP]) -> None:
    start = make().method
    assert isinstance(start, SHARP)
    share = [float(mask.float().mean()) for mask in start.masks]
    assert share[0] == 1.0
    for index in (1, 2, 3):
        assert share[index] == pytest.approx(0.4, abs=0.1)
        counts = [int(method.masks[index].sum()) for method in [start, *history]]
        assert all(b <= a for a, b in itertools.pairwise(counts))
        assert counts[1] == counts[0], "the first episode has places enough"


# -- one step --------------------------------------------------------------------------------------------------------
def batch_of(method: SHARP, labels: list[int], step: int, task: int = 0) -> Batch:
    phases = method.phases(Task(torch.arange(3), torch.arange(3), torch.arange(3)), task)
    images = torch.rand((len(labels), 1, 6, 6), generator=generator(step, "images"))
    targets = torch.tensor(labels)
    return Batch(images, targets, targets, None, torch.ones(10).bool(), Cursor(task, 1, 0, 0, step), phases[1], 0)


def ready(net: Callable[[], nn.Module] = Net, config: SHARPConfig = SMALL) -> SHARP:
    """A method in its first training phase: units selected, rewired."""
    learner = make(config=config, net=net)
    method = learner.method
    assert isinstance(method, SHARP)
    task = learner.scenario.tasks[0]
    selection, training = method.phases(task, 0)[:2]
    method.step(batch_of(method, [0, 1] * 8, 0)._replace(phase=selection))
    method.end_phase(task, selection, Cursor(0, 0, 1, 0, 1))
    method.open_phase(task, training, Cursor(0, 1, 0, 0, 1))
    return method


def test_a_step_is_that_of_masked_weights() -> None:
    """Masking the gradient of weights kept at 0 gives the same numbers as masking weights in the forward pass."""
    method = ready()
    names = [f"layers.{index}" for index in range(4)]
    masks = dict(zip(names, method.masks, strict=True))
    weights = {k: v.detach().clone().requires_grad_() for k, v in method.network.named_parameters()}
    optimizer = torch.optim.Adadelta(weights.values(), lr=1.0)
    awake = (method.ages[-1] != 0).float()
    for step in range(1, 6):
        batch = batch_of(method, [0, 0, 1, 1, 1, 3], step)
        loss = method.step(batch)["loss"]
        masked = {
            f"{name}.weight": weights[f"{name}.weight"] * masks[name].view(*masks[name].shape, *[1] * (2 * (i < 2)))
            for i, name in enumerate(names)
        }
        out = functional_call(method.network, {**weights, **masked}, (batch.images[:5],)) * awake
        expected = supcon_loss(out, batch.targets[:5], 0.1)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach())
    for name, value in method.network.named_parameters():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-4)


def test_nothing_flows_through_plastic_units() -> None:
    method = ready()
    plastic = method.ages[-1] == 0
    assert plastic.any()
    assert not plastic.all()
    before = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in method.network.unit_layers]
    method.step(batch_of(method, [0, 0, 1, 1], 1))
    assert (method.features(IMAGES, None)[:, plastic] == 0).all()
    for index, layer in enumerate(method.network.unit_layers):
        rows = method.ages[index + 1] == 0
        assert layer.weight.grad is not None
        assert (layer.weight.grad[rows] == 0).all()
        assert torch.equal(layer.weight[rows], before[index][0][rows])
        assert torch.equal(layer.bias[rows], before[index][1][rows])
    assert (method.network.unit_layers[-1].weight != before[-1][0]).any()


def test_weight_decay_is_in_the_loss_and_spares_absent_connections() -> None:
    plain, decayed = ready(), ready(config=replace(SMALL, weight_decay=0.1))
    batch = batch_of(plain, [0, 0, 1, 1], 1)
    squares = sum(float(p.detach().square().sum()) for p in plain.network.parameters())
    difference = decayed.step(batch)["loss"] - plain.step(batch)["loss"]
    assert float(difference) == pytest.approx(0.1 * squares, rel=1e-4)
    for layer, mask in zip(decayed.network.unit_layers, decayed.masks, strict=True):
        assert (layer.weight[~mask] == 0).all()


def test_phases_share_the_epochs() -> None:
    assert phase_lengths(30, 3) == [3] * 10
    assert phase_lengths(7, 3) == [3, 3, 1]
    learner = make(epochs=5, config=replace(SMALL, phase_epochs=2, lr_decay=0.5))
    task = learner.scenario.tasks[0]
    phases = learner.method.phases(task, 0)
    assert [(p.name, p.epochs) for p in phases] == [
        ("select", 1), ("train", 2), ("select", 1), ("train", 2), ("select", 1), ("train", 1),
    ]  # fmt: skip
    rates = []
    for number in (1, 3, 5):
        learner.method.open_phase(task, phases[number], Cursor(0, number, 0, 0, 0))
        rates.append(learner.method.optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 0.5, 0.25]


# -- replay ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recent", [0, 1, 2])
def test_only_recent_episodes_are_kept_and_replayed(recent: int) -> None:
    learner, methods = episodes_of(replace(SMALL, recent_episodes=recent), tasks=4, num_classes=8, epochs=2)
    for episode, method in enumerate(methods):
        kept = [e for e in range(episode + 1) if e > episode - recent]
        assert sorted(set(method.memory.episodes.tolist())) == kept
        assert method.memory.labels.tolist() == [c for e in kept for c in (2 * e, 2 * e + 1)]
        assert classes_with_vectors(method) == list(range(2 * episode + 2))
        size = 6 * 16 * 1 * 1  # stm_per_class activations
        assert learner.memory[episode]["activation_memory"] == 2 * len(kept) * (size + 8)
        own = [vectors_of(method, label)[0] for label in range(0, 2 * episode + 2, 2)]  # one group per episode
        assert learner.memory[episode]["class_vectors"] == sum(10 * (4 * len(u) + 4 + 8) + 8 * len(u) for u in own)
        assert learner.memory[episode]["connection_masks"] == sum(mask.numel() for mask in method.masks)
        assert learner.memory[episode]["unit_ages"] == 8 * (1 + 16 + 16 + 2 * WIDTH)
    for label in range(8):  # rewritten once per episode that replays them
        age = min(2 + recent, 2 + (3 - label // 2))
        expected = expected_units(methods, label // 2, age)
        assert torch.equal(vectors_of(methods[-1], label)[0], expected.nonzero()[:, 0])


def expected_units(methods: list[SHARP], episode: int, age: int) -> Tensor:
    """Units of at least `age` behind the episode in which vectors of `episode` had been written `age - 1` times."""
    return age_mask(methods[episode + age - 2].ages[-1], age)


def test_stored_activations_are_those_of_the_first_images() -> None:
    learner, methods = episodes_of(tasks=2, num_classes=4)
    task = learner.scenario.tasks[0]
    rows = task.rows[task.targets == 1][:6]
    images = learner.stream.read(rows, None, "test")
    hidden = methods[0].network.early(images)
    stored = methods[0].memory.of_class(1)
    # stored ahead of the re-drawing of plastic channels
    channels = methods[0].ages[2] != 0
    step = float(methods[0].memory.ranges[1].diff()) / 255
    assert (stored - hidden)[:, channels].abs().max() <= 0.51 * step
    units, vectors = vectors_of(methods[0], 1)
    torch.testing.assert_close(vectors, F.normalize(methods[0].features(images[:5], None)[:, units], dim=1))


def test_a_class_with_few_images_gives_what_it_has() -> None:
    config = replace(SMALL, stm_per_class=30, ltm_per_class=20)
    _, methods = episodes_of(config, tasks=3, num_classes=6)
    assert methods[-1].memory.available.tolist() == [12, 12]  # images per class
    assert methods[-1].memory.of_class(5).shape == (12, 16, 1, 1)
    assert [len(vectors_of(methods[-1], label)[1]) for label in range(6)] == [12] * 6
    assert methods[-1].classify(torch.rand(4, WIDTH), torch.ones(6).bool(), None).sum(1).tolist() == [3.0] * 4


def test_a_class_that_comes_again_is_stored_anew() -> None:
    store = make_store(4)
    scenario = split_scenario(store, 2)
    first, second = scenario.tasks
    again = Task(
        torch.cat([second.rows, first.rows[first.targets == 1]]),
        torch.cat([second.targets, first.targets[first.targets == 1]]), second.classes,
    )  # fmt: skip
    scenario = replace(scenario, tasks=(first, again))
    learner = run(learner_for(scenario, SHARP, store=store, backbone=Net, config=SMALL, schedule=SELDOM))
    method = learner.method
    assert isinstance(method, SHARP)
    assert sorted(method.memory.labels.tolist()) == [1, 2, 3]
    assert set(method.memory.episodes.tolist()) == {1}
    units, vectors = vectors_of(method, 1)
    assert torch.equal(units, vectors_of(method, 0)[0])  # both as replayed classes
    assert (method.ages[-1][units] >= 3).all()
    hidden = method.memory.of_class(1)[:5]  # the new ones
    torch.testing.assert_close(vectors, F.normalize(method._from_early(hidden)[:, units], dim=1))


# -- runs ------------------------------------------------------------------------------------------------------------
def test_survives_kill() -> None:
    config = replace(SMALL, recent_episodes=2, lr_decay=0.9)
    assert_survives_kill(partial(make, tasks=3, num_classes=6, config=config, epochs=2), at_most=8)


def test_learns_and_remembers() -> None:
    config = replace(SMALL, min_activation=90.0, stm_per_class=12, ltm_per_class=12)
    learner = run(make(tasks=3, num_classes=6, config=config, epochs=12))
    after, hits = learner.matrix[-1]
    assert after == 2
    assert int(hits.sum()) >= 0.75 * 36
    assert int(hits[0]) >= 9, "three quarters of the first task, of which naive training would know nothing"


def test_task_setting_answers_from_the_task_alone() -> None:
    learner = run(make(tasks=3, num_classes=6, epochs=6, setting="task"))
    guesses = learner.predictions[-1].view(3, -1)
    for task in range(3):
        assert set(guesses[task].tolist()) <= {2 * task, 2 * task + 1}


def test_before_the_first_episode_ends_there_is_no_answer() -> None:
    method = make().method
    votes = method.logits(IMAGES, torch.ones(10, dtype=torch.bool), None)
    assert votes.shape == (9, 10)
    assert (votes == 0).all()


def test_pretrained_early_block_never_changes() -> None:
    config = replace(SMALL, pretrained_early=True)
    net = partial(Net, True)
    start = make(config=config, net=net).method
    assert isinstance(start, SHARP)
    _, methods = episodes_of(config, net=net, tasks=3, num_classes=6)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        file = Net(True)
    for index, layer in enumerate(methods[-1].network.unit_layers):
        same = torch.equal(layer.weight, file.net.unit_layers[index].weight)
        assert same == (index < 2)
    assert methods[-1].masks[1].all()
    assert methods[-1].ages[1].tolist() == [103] * 16
    rest = start.network.unit_layers[2].weight
    assert not torch.equal(rest, file.net.unit_layers[2].weight * start.masks[2])  # drawn anew
    live = rest[start.masks[2]]
    assert float(live.detach().std()) == pytest.approx((2 / rest.shape[1]) ** 0.5, rel=0.15)


# -- what cannot be met ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("which backbone Flat is not: give --backbone mnistlike", {"net": Flat}),
        ("leaves layer 2 of sharp's network, 16 units", {"config": replace(SMALL, sparsity=1.0)}),
        ("needs a trained network: give --weights FILE", {"config": replace(SMALL, pretrained_early=True)}),
    ],
)
def test_bad_input_is_one_sentence(says: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=says) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_online_scenarios_and_small_images_are_refused() -> None:
    scenario = replace(split_scenario(make_store(6), 3), online=True)
    with pytest.raises(InputError, match=r"scenario tiny@1 is online"):
        learner_for(scenario, SHARP, backbone=Net, config=SMALL)
    with pytest.raises(InputError, match=r"needs at least 8 x 8 px, not 4 x 4"):
        backbones.build("vgg-small", in_shape=(3, 4, 4), seed=0)


# -- recipes ---------------------------------------------------------------------------------------------------------
PUBLISHED = {  # sharp card, section 3: B = R, T, min act, phase epochs, epochs, LTM, k, STM
    "split-mnist@1": (256, 0.1, 90, 3, 30, 25, 5, 25),
    "split-fashion-mnist@1": (1024, 0.2, 75, 3, 36, 25, 25, 25),
    "split-emnist-letters@1": (256, 0.1, 60, 3, 45, 25, 5, 25),
    "split-cifar10@1": (256, 0.2, 70, 5, 75, 50, 5, 200),
    "split-cifar100@1": (64, 0.05, 70, 5, 75, 50, 5, 100),
}


@pytest.mark.parametrize("scenario", PUBLISHED)
def test_recipes_hold_the_published_values(scenario: str) -> None:
    recipe = find_recipe(find_method("sharp"), scenario)
    assert recipe is not None
    config, _ = make_config(SHARPConfig, {"recipe": recipe.set}, "sharp")
    found = (
        recipe.run["batch_size"], config.temperature, config.min_activation, config.phase_epochs, recipe.run["epochs"],
        config.ltm_per_class, config.neighbours, config.stm_per_class,
    )  # fmt: skip
    assert found == PUBLISHED[scenario]
    common = (config.lr, config.lr_decay, config.weight_decay, config.sparsity, config.tau_period, config.reinit)
    assert common == (1.0, 1.0, 0.0, 0.6, 30.0, True)
    assert (config.replay_batch_size, config.recent_episodes) == (0, 1)  # 0: as many as the batch
    assert recipe.backbone == ("vgg-small" if "cifar" in scenario else "mnistlike")
    assert recipe.run["train_view"] == recipe.run["test_view"], "no augmentation"


def test_recipe_file_has_one_entry_per_configuration() -> None:
    path = Path(sharp_module.__file__).parent / "recipes" / "sharp.toml"
    entries = tomllib.loads(path.read_text())["recipe"]
    assert len({entry["scenario"] for entry in entries}) == len(entries) == len(PUBLISHED) + 1
