"""GDumb's greedy balanced memory against a plain list with the same draws, and what it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.learner.hostreads import forbid_host_reads
from clbench.memory.class_balanced import ClassBalancedBuffer
from clbench.rng import generator

CLASSES = 5


def add_one(held: dict[int, list[tuple[int, int]]], row: int, target: int, capacity: int, u: float) -> None:
    """The card's rule (2.8) over lists of (slot, row) by class, one sample at a time. The one to leave is counted in
    the order of slots. Python's max gives the first of several largest classes."""
    quota = capacity // max(1, len(held))
    if target in held and len(held[target]) >= quota:
        return
    slot = sum(map(len, held.values()))
    if slot >= capacity:
        largest = max(held, key=lambda label: len(held[label]))
        entries = sorted(held[largest])
        slot, _ = entries.pop(int(u * len(entries)))
        held[largest] = entries
    held.setdefault(target, []).append((slot, row))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.lists(st.lists(st.integers(0, CLASSES - 1), max_size=9), max_size=8), st.integers(0, 99))
def test_matches_a_plain_list(capacity: int, stream: list[list[int]], seed: int) -> None:
    """Capacities below the number of classes (quota 0) among them."""
    buffer = ClassBalancedBuffer(capacity, CLASSES)
    held: dict[int, list[tuple[int, int]]] = {}
    row = 0
    for step, labels in enumerate(stream):
        rows = torch.arange(row, row + len(labels))
        buffer.add(rows, torch.tensor(labels, dtype=torch.int64), generator(seed, "add", step), domain=rows + 7)
        draws = torch.rand(len(labels), dtype=torch.float64, generator=generator(seed, "add", step)).tolist()
        for label, u in zip(labels, draws, strict=True):
            add_one(held, row, label, capacity, u)
            row += 1
        expected = sorted((slot, r, label) for label, entries in held.items() for slot, r in entries)
        got = list(zip(range(len(buffer)), buffer.rows.tolist(), buffer.targets.tolist(), strict=True))
        assert got == expected
        assert buffer.counts.tolist() == [len(held.get(label, [])) for label in range(CLASSES)]
        assert len(buffer) <= capacity
        assert buffer.num_seen == row
        assert torch.equal(buffer.take(torch.arange(len(buffer))).rows + 7, buffer._index[2, : len(buffer)])


def fill(buffer: ClassBalancedBuffer, labels: list[int], key: int = 0) -> None:
    buffer.add(torch.arange(len(labels)), torch.tensor(labels), generator(0, "fill", key))


def test_a_new_class_is_judged_by_the_quota_before_it_counts() -> None:
    """Capacity 4: two of class 0 and two of class 1 are full. A first sample of class 2 is taken whatever the quota
    (2); then there are three classes and the quota is 1, so that a second one is refused."""
    buffer = ClassBalancedBuffer(4, 3)
    fill(buffer, [0, 0, 1, 1])
    fill(buffer, [2, 2], 1)
    assert buffer.counts.tolist() == [1, 2, 1], "of two largest classes the one that came first gives way"


def test_the_first_class_takes_all_and_gives_way() -> None:
    buffer = ClassBalancedBuffer(6, 3)
    fill(buffer, [1] * 10)
    assert buffer.counts.tolist() == [0, 6, 0]
    fill(buffer, [2] * 10, 1)
    assert buffer.counts.tolist() == [0, 3, 3]
    fill(buffer, [0] * 10, 2)
    assert buffer.counts.tolist() == [2, 2, 2]


def test_a_long_stream_ends_balanced_and_its_sample_is_even() -> None:
    buffer = ClassBalancedBuffer(100, 10)
    for step in range(100):
        rows = torch.arange(step * 20, step * 20 + 20)
        buffer.add(rows, rows % 10, generator(1, "add", step))
    assert buffer.counts.tolist() == [10] * 10
    assert torch.bincount(buffer.targets, minlength=10).tolist() == [10] * 10
    assert len(buffer.rows.unique()) == 100


def test_payload_and_state_stay_with_their_rows() -> None:
    made = [ClassBalancedBuffer(7, CLASSES, payload={"logits": (2,)}) for _ in range(2)]
    buffer, again = made
    for step in range(6):
        rows = torch.arange(step * 5, step * 5 + 5)
        labels = (rows * 7) % CLASSES
        buffer.add(rows, labels, generator(0, "add", step), logits=rows[:, None].float().repeat(1, 2))
        held = buffer.take(torch.arange(len(buffer)))
        assert torch.equal(held.payload["logits"][:, 0].long(), held.rows)
        assert torch.equal((held.rows * 7) % CLASSES, held.targets)
        again.load_state_dict(buffer.state_dict())
    rows = torch.arange(90, 99)
    for copy in made:
        copy.add(rows, rows % CLASSES, generator(0, "more"), logits=torch.zeros(9, 2))
    assert torch.equal(buffer.rows, again.rows)
    assert torch.equal(buffer.counts, again.counts)
    with pytest.raises(ValueError, match="stores"):
        buffer.add(rows, rows % CLASSES, generator(0, "more"))


def test_update_and_draw_read_nothing_on_the_host() -> None:
    buffer = ClassBalancedBuffer(8, CLASSES, payload={"x": ()})
    rows = torch.arange(10)
    with forbid_host_reads():
        for step in range(3):
            buffer.add(rows, rows % CLASSES, generator(0, "add", step), domain=rows, x=rows.float())
            buffer.sample(4, generator(0, "draw", step))


def test_draws_are_distinct_and_repeat_where_too_few_are_held() -> None:
    buffer = ClassBalancedBuffer(8, 2)
    assert len(buffer.sample(3, generator(0, "draw"))) == 0
    fill(buffer, [0, 1, 1])
    for step in range(20):
        drawn = buffer.sample(7, generator(0, "draw", step))
        assert sorted(drawn.slots[:3].tolist()) == [0, 1, 2]
        assert torch.bincount(drawn.slots, minlength=3).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
        assert torch.equal(drawn.targets, torch.tensor([0, 1, 1])[drawn.slots])
        assert len(buffer.sample(2, generator(0, "draw", step)).slots.unique()) == 2


def test_capacity_zero_keeps_nothing_and_a_negative_one_is_refused() -> None:
    buffer = ClassBalancedBuffer(0, 2)
    fill(buffer, [0, 1, 1])
    assert len(buffer) == 0
    assert len(buffer.sample(2, generator(0, "draw"))) == 0
    with pytest.raises(ValueError, match="capacity is -1"):
        ClassBalancedBuffer(-1, 2)
