"""NMC against the official formulas' vectors, and the invariants of its card (section 7)."""

import copy
import io
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clbench.data.classes import ClassTable
from clbench.errors import RunFailed
from clbench.learner.hostreads import forbid_host_reads
from clbench.methods.base import Setting
from clbench.methods.nmc import METHOD, NMC, NMCConfig, cosine_head, nearest_mean_head
from clbench.rng import generator
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "nmc.json").read_text())
CASE = VECTORS["nmc"]
TRAIN = torch.tensor(CASE["train_features"], dtype=torch.float64)
LABELS = torch.tensor(CASE["train_labels"])
TEST = torch.tensor(CASE["test_features"], dtype=torch.float64)
NUM_CLASSES = 5


class Backbone(nn.Module):
    """Features are the images themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale


def make(prototype: str = "nmc", num_classes: int = NUM_CLASSES, width: int = 6) -> NMC:
    table = ClassTable(
        tuple(f"c{i}" for i in range(num_classes)), torch.zeros(num_classes).long(), torch.full((num_classes,), -1)
    )
    device = torch.device("cpu")
    setting = Setting(
        classes=table, classes_per_task=None, task_classes=(torch.arange(num_classes),), image_shape=(width,),
        image_bytes=width, device=device, scenario_id="test@1", setting="class", online=False, epochs=1, batch_size=8,
        updates_per_batch=1, prompts={}, read=lambda *a, **k: torch.zeros(0), rng=partial(generator, 0, device=device),
    )  # fmt: skip
    return NMC(NMCConfig(prototype), Backbone(width), setting)


def as_task(features: Tensor, labels: Tensor) -> Task:
    return Task(torch.arange(len(labels)), labels, labels.unique())


def absorb(method: NMC, features: Tensor, labels: Tensor, task: int = 0, batch_size: int = 7) -> None:
    """One task as the learner runs it, host reads forbidden."""
    entry = as_task(features, labels)
    (phase,) = method.phases(entry, task)
    assert (phase.source, phase.epochs, phase.order, phase.view) == ("task", 1, "listed", "features")
    method.begin_phase(entry, phase, Cursor(task, 0, 0, 0, 0))
    method.open_phase(entry, phase, Cursor(task, 0, 0, 0, 0))
    seen = torch.ones(method.setting.num_classes, dtype=torch.bool)
    for i, start in enumerate(range(0, len(labels), batch_size)):
        cut = slice(start, start + batch_size)
        at = Cursor(task, 0, i, 0, i)
        batch = Batch(features[cut], labels[cut], entry.rows[cut], None, seen, at, phase, 0)
        with forbid_host_reads():
            method.step(batch)
    method.end_phase(entry, phase, Cursor(task, 0, 0, 0, 0))


def scores(method: NMC, features: Tensor) -> Tensor:
    allowed = torch.ones(method.setting.num_classes, dtype=torch.bool)
    return method.logits(features, allowed, None)


def means(method: NMC) -> Tensor:
    return nearest_mean_head(method.sums, method.counts)[0]


def test_official_means_distances_and_predictions() -> None:
    method = make()
    absorb(method, TRAIN, LABELS)
    torch.testing.assert_close(
        means(method), torch.tensor(CASE["class_means"], dtype=torch.float64), atol=1e-10, rtol=0
    )
    got = scores(method, TEST)
    distances = (1 - 2 * got).sqrt()  # |g - m|^2 = |g|^2 - 2 (g m - |m|^2 / 2)
    torch.testing.assert_close(distances, torch.tensor(CASE["distances"], dtype=torch.float64), atol=1e-10, rtol=0)
    assert got.argmax(1).tolist() == CASE["pred"]
    for wrong in ("wrong_renormalised_means_cosine", "wrong_simplecil", "wrong_raw_euclidean"):
        assert got.argmax(1).tolist() != CASE[wrong]


def test_official_simplecil_predictions() -> None:
    method = make("simplecil")
    absorb(method, TRAIN, LABELS)
    got = scores(method, TEST)
    assert got.argmax(1).tolist() == CASE["wrong_simplecil"]
    raw_means = torch.stack([TRAIN[c == LABELS].mean(0) for c in range(NUM_CLASSES)])
    cosine = nn.functional.cosine_similarity(TEST[:, None], raw_means[None], dim=2)
    torch.testing.assert_close(got, cosine, atol=1e-12, rtol=0)


def test_incremental_predictions_over_the_seen_classes() -> None:
    method = make()
    for task, (classes, expected) in enumerate(zip([[0, 1], [2, 3], [4]], VECTORS["incremental"], strict=True)):
        rows = torch.isin(LABELS, torch.tensor(classes))
        before = method.sums.clone()
        absorb(method, TRAIN[rows], LABELS[rows], task)
        seen = torch.arange(NUM_CLASSES) < expected["seen"]
        got = scores(method, TEST)
        assert got.masked_fill(~seen, -torch.inf).argmax(1).tolist() == expected["pred"]
        assert got.argmax(1).tolist() == expected["pred"]  # a class without rows loses even where it may win
        old = before.abs().sum(1) > 0
        assert torch.equal(method.sums[old], before[old])


@pytest.mark.parametrize("prototype", ["nmc", "simplecil"])
def test_a_class_without_rows_never_wins(prototype: str) -> None:
    method = make(prototype)
    absorb(method, TRAIN[LABELS != 2], LABELS[LABELS != 2])
    for features in (TEST, torch.zeros(1, 6, dtype=torch.float64), -TRAIN[LABELS == 0], 1e6 * TEST):
        got = scores(method, features)
        assert torch.isfinite(got).all()
        assert (got.argmax(1) != 2).all()
    assert set(VECTORS["pitfall"]["pred"]) == {2}  # what the official code answers there
    assert torch.isfinite(scores(make(prototype), TEST)).all()  # before any row at all


rows_of_three_classes = st.integers(3, 40).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, 2**31), st.integers(1, 17), st.lists(st.integers(1, 39), max_size=3))
)


@settings(max_examples=40, deadline=None)
@given(rows_of_three_classes)
def test_means_do_not_depend_on_order_batches_or_tasks(drawn: tuple[int, int, int, list[int]]) -> None:
    n, seed, batch_size, cuts = drawn
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn((n, 6), generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 3, (n,), generator=rng)
    whole = make()
    absorb(whole, features, labels, batch_size=n)
    shuffled = make()
    order = torch.randperm(n, generator=rng)
    borders = [0, *sorted({c for c in cuts if c < n}), n]
    for task, (start, end) in enumerate(pairwise(borders)):  # a class may come in several tasks
        rows = order[start:end]
        absorb(shuffled, features[rows], labels[rows], task, batch_size)
    assert torch.equal(whole.counts, shuffled.counts)
    torch.testing.assert_close(means(whole), means(shuffled), atol=1e-12, rtol=0)
    assert (means(whole).norm(dim=1) <= 1 + 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 39), st.floats(1e-3, 1e3))
def test_scaling_one_image_changes_nothing_for_nmc(row: int, factor: float) -> None:
    scaled = TRAIN.clone()
    scaled[row] *= factor
    method, other = make(), make()
    absorb(method, TRAIN, LABELS)
    absorb(other, scaled, LABELS)
    torch.testing.assert_close(means(method), means(other), atol=1e-12, rtol=0)
    torch.testing.assert_close(scores(method, TEST), scores(other, TEST * factor), atol=1e-12, rtol=0)


def test_scaling_one_image_changes_simplecil() -> None:
    scaled = TRAIN.clone()
    scaled[0] *= 50
    method, other = make("simplecil"), make("simplecil")
    absorb(method, TRAIN, LABELS)
    absorb(other, scaled, LABELS)
    first, second = (cosine_head(m.sums, m.counts)[0][0] for m in (method, other))
    assert (first - second).abs().max() > 0.01


def test_means_are_inside_the_unit_ball() -> None:
    method = make()
    absorb(method, TRAIN, LABELS)
    norms = means(method).norm(dim=1)
    assert (norms < 1 - 1e-3).all()  # a re-normalising implementation gives 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_expanded_form_is_the_nearest_mean(seed: int) -> None:
    features = torch.randn((50, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    method = make()
    absorb(method, TRAIN, LABELS)
    unit = nn.functional.normalize(features, dim=1)
    assert torch.equal(scores(method, features).argmax(1), torch.cdist(unit, means(method)).argmin(1))


def test_zero_features_are_answered_by_the_mean_nearest_to_zero() -> None:
    method = make()
    absorb(method, TRAIN, LABELS)
    got = scores(method, torch.zeros(1, 6, dtype=torch.float64))
    assert int(got.argmax()) == int(means(method).norm(dim=1).argmin())


def test_a_second_pass_keeps_the_means_and_a_task_counts_once() -> None:
    method = make()
    absorb(method, TRAIN, LABELS, task=0)
    before = means(method)
    absorb(method, TRAIN, LABELS, task=1)  # the same rows as another task: sums and counts both double
    torch.testing.assert_close(means(method), before, atol=1e-12, rtol=0)
    assert method.counts.tolist() == [16.0] * 5
    with pytest.raises(RunFailed, match="each task counts once"):
        absorb(method, TRAIN, LABELS, task=1)


def test_resume_in_the_middle_is_bit_identical() -> None:
    whole = make()
    absorb(whole, TRAIN, LABELS)
    part, task = make(), as_task(TRAIN, LABELS)
    (phase,) = part.phases(task, 0)
    part.begin_phase(task, phase, Cursor(0, 0, 0, 0, 0))
    seen = torch.ones(NUM_CLASSES, dtype=torch.bool)
    for i in range(6):
        if i == 3:
            file = io.BytesIO()
            torch.save(part.state_dict(), file)
            file.seek(0)
            part = make()
            part.open_phase(task, phase, Cursor(0, 0, 3, 0, 3))
            part.load_state_dict(torch.load(file, weights_only=True))
        cut = slice(7 * i, 7 * i + 7)
        part.step(Batch(TRAIN[cut], LABELS[cut], task.rows[cut], None, seen, Cursor(0, 0, i, 0, i), phase, 0))
    assert torch.equal(part.sums, whole.sums)
    assert torch.equal(part.counts, whole.counts)
    with pytest.raises(RunFailed):  # the resumed one still knows which tasks it has
        part.begin_phase(task, phase, Cursor(0, 0, 0, 0, 0))


def test_backbone_stays_as_it_is() -> None:
    method = make()
    weights = copy.deepcopy(method.backbone.state_dict())
    absorb(method, TRAIN, LABELS)
    assert not method.backbone.training
    assert all(not p.requires_grad and p.grad is None for p in method.backbone.parameters())
    assert all(torch.equal(weights[k], v) for k, v in method.backbone.state_dict().items())
    assert "backbone" not in method.state_dict()
    assert method.features_version == 0


@pytest.mark.parametrize("prototype", ["nmc", "simplecil"])
def test_fused_head_gives_the_same_scores(prototype: str) -> None:
    method = make(prototype)
    absorb(method, TRAIN, LABELS)
    features = method.features(TEST.float(), None)
    head = method.head(None)
    assert head.kind == "linear"
    torch.testing.assert_close(features @ head.weight.T + head.bias, scores(method, TEST.float()))
    expected = scores(method, TEST.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(method, TEST.float()), expected)
    assert method.memory_bytes() == {"class_sums": NUM_CLASSES * (6 + 1) * 8}


def test_method_is_registered() -> None:
    assert METHOD is NMC
    assert NMC.settings == {"class", "task", "domain"}
