"""Herding against iCaRL's rule in loops, and the memory that is cut between tasks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clbench.learner.hostreads import forbid_host_reads
from clbench.memory.herding import HerdedBuffer, herding_order
from clbench.rng import generator


def herding_in_loops(features: Tensor, count: int) -> list[int]:
    """iCaRL, Algorithm 4: at each step the sample that brings the mean of those picked closest to the class mean."""
    vectors = [row / row.norm() for row in features]
    mean = sum(vectors) / len(vectors)
    picked: list[int] = []
    while len(picked) < min(count, len(vectors)):
        left = [i for i in range(len(vectors)) if i not in picked]
        gaps = [float((mean - sum(vectors[j] for j in [*picked, i]) / (len(picked) + 1)).norm()) for i in left]
        picked.append(left[gaps.index(min(gaps))])
    return picked


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 25), st.integers(0, 30), st.integers(0, 10**6))
def test_order_matches_the_loops(num: int, count: int, seed: int) -> None:
    """From three samples on: two are equally far from their mean, and rounding decides."""
    features = torch.randn(num, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = herding_order(features, count)
    assert order.tolist() == herding_in_loops(features, count)
    assert len(order.unique()) == min(num, count)
    assert torch.equal(herding_order(features, count // 2), order[: count // 2]), "not a prefix"
    assert torch.equal(herding_order(5 * features, count), order), "depends on the length of the features"


def test_one_sample_and_none() -> None:
    assert herding_order(torch.ones(1, 3), 5).tolist() == [0]
    assert herding_order(torch.ones(0, 3), 5).tolist() == []
    assert sorted(herding_order(torch.eye(2), 5).tolist()) == [0, 1]


def test_the_mean_of_few_is_closer_than_that_of_a_random_few() -> None:
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features, dim=1)
    mean = unit.mean(0)
    herded = (unit[herding_order(features, 10)].mean(0) - mean).norm()
    drawn = [(unit[torch.randperm(200, generator=generator(0, "r", i))[:10]].mean(0) - mean).norm() for i in range(50)]
    assert herded < min(drawn)


def test_order_reads_nothing_on_the_host() -> None:
    with forbid_host_reads():
        herding_order(torch.randn(9, 3, generator=generator(0, "f")), 4)


def filled(capacity: int = 12) -> HerdedBuffer:
    buffer = HerdedBuffer(capacity, payload={"logits": (2,)})
    for label in range(2):
        features = torch.randn(9, 4, generator=generator(label, "features"))
        rows = torch.arange(9) + 100 * label
        kept = buffer.add_class(features, rows, label, 6, domain=rows + 1, logits=rows[:, None].float().repeat(1, 2))
        assert kept == 6
        assert torch.equal(buffer.rows[-6:], rows[herding_order(features, 6)])
    return buffer


def test_classes_are_cut_to_their_first_picked() -> None:
    buffer = filled()
    before = buffer.rows.clone()
    buffer.reduce(4)
    assert torch.equal(buffer.rows, torch.cat([before[:4], before[6:10]]))
    assert buffer.ranks.tolist() == [0, 1, 2, 3] * 2
    assert buffer.targets.tolist() == [0] * 4 + [1] * 4
    held = buffer.take(torch.arange(8))
    assert torch.equal(held.domain, held.rows + 1)
    assert torch.equal(held.payload["logits"][:, 1].long(), held.rows)
    drawn = buffer.sample(5, generator(0, "draw"))
    assert len(drawn.slots.unique()) == 5
    assert drawn.slots.max() < 8


def test_a_full_memory_takes_what_fits_and_few_samples_are_all_kept() -> None:
    buffer = filled(14)
    features, rows = torch.randn(9, 4, generator=generator(5, "features")), torch.arange(9)
    assert buffer.add_class(features, rows, 2, 6, logits=torch.zeros(9, 2)) == 2
    assert len(buffer) == 14
    buffer.reduce(1)
    assert buffer.add_class(features[:1], rows[:1], 3, 6, logits=torch.zeros(1, 2)) == 1
    assert buffer.targets.tolist() == [0, 1, 2, 3]
    assert buffer.add_class(features[:0], rows[:0], 4, 6, logits=torch.zeros(0, 2)) == 0


def test_state_goes_round_and_wrong_use_is_refused() -> None:
    buffer, again = filled(), HerdedBuffer(12, payload={"logits": (2,)})
    again.load_state_dict(buffer.state_dict())
    for copy in (buffer, again):
        copy.reduce(3)
    assert torch.equal(buffer.rows, again.rows)
    assert torch.equal(buffer.ranks, again.ranks)
    assert buffer.num_seen == again.num_seen == 18
    with pytest.raises(ValueError, match="stores"):
        buffer.add_class(torch.zeros(1, 4), torch.arange(1), 3, 1)
    with pytest.raises(TypeError, match="add_class"):
        buffer.add(torch.arange(1), torch.arange(1), generator(0, "add"))
