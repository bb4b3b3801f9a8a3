"""Reservoir rules against the official batch rule's vectors and their statistics; the buffer against a plain list."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clbench.learner.hostreads import forbid_host_reads
from clbench.memory import Buffer, reservoir_slots
from clbench.rng import generator

CASES = json.loads((Path(__file__).parent / "fixtures" / "reservoir.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"M={case['inputs']['M']}")
def test_batch_rule_matches_the_official_code(case: dict) -> None:
    capacity, draws = case["inputs"]["M"], iter(case["inputs"]["draw_log"])
    held = torch.zeros(capacity + 1, dtype=torch.int64)
    seen = 0
    for batch in map(torch.tensor, case["inputs"]["stream"]):
        uniform = None
        if len(batch) > max(capacity - seen, 0):
            draw = next(draws)
            assert draw["high"] == max(seen, min(capacity, seen + len(batch)))
            uniform = (torch.tensor(draw["draws"], dtype=torch.float64) + 0.5) / draw["high"]
        slots = reservoir_slots(seen, len(batch), capacity, "batch", uniform)
        held.index_copy_(0, slots, batch)
        seen += len(batch)
    assert held[:capacity].tolist() == case["expected"]["content"]
    assert seen == case["expected"]["n_seen"]


def exact_reference(values: list[int], capacity: int, uniform: list[float]) -> list[int]:
    """Algorithm R, one sample at a time."""
    held: list[int] = []
    for n, (value, u) in enumerate(zip(values, uniform, strict=True)):
        if len(held) < capacity:
            held.append(value)
        else:
            slot = int(u * (n + 1))
            if slot < capacity:
                held[slot] = value
    return held


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 2**31))
def test_exact_rule_matches_algorithm_r(sizes: list[int], capacity: int, seed: int) -> None:
    total = sum(sizes)
    uniform = torch.rand(total, dtype=torch.float64, generator=generator(seed, "test"))
    held = torch.full((capacity + 1,), -1)
    start = 0
    for size in sizes:
        fill = min(max(capacity - start, 0), size)
        slots = reservoir_slots(start, size, capacity, "exact", uniform[start + fill : start + size])
        held.index_copy_(0, slots, torch.arange(start, start + size))
        start += size
    expected = exact_reference(list(range(total)), capacity, uniform.tolist())
    assert held[: len(expected)].tolist() == expected


@pytest.mark.parametrize("rule", ["exact", "batch"])
def test_long_stream_is_sampled_evenly(rule: str) -> None:
    """Every tenth of a stream of 20,000 holds a tenth of 1,000 slots (chi-square at p = 1e-4: 33.7 for 9 degrees). The
    batch rule is a little biased to the sample by construction, not to the tenth."""
    buffer = Buffer(1000, rule=rule)
    for step in range(2000):
        rows = torch.arange(step * 10, step * 10 + 10)
        buffer.add(rows, rows % 7, generator(3, "add", step))
    counts = torch.bincount(buffer.rows // 2000, minlength=10).double()
    assert float(((counts - 100) ** 2 / 100).sum()) < 33.7


@given(
    st.integers(0, 30),
    st.lists(st.integers(0, 25), max_size=8),
    st.sampled_from(["batch", "exact"]),
    st.integers(0, 99),
)
def test_buffer_invariants(capacity: int, sizes: list[int], rule: str, seed: int) -> None:
    buffer = Buffer(capacity, payload={"logits": (3,)}, rule=rule)
    seen = 0
    for step, size in enumerate(sizes):
        rows = torch.arange(seen, seen + size)
        logits = rows[:, None].float().repeat(1, 3)
        buffer.add(rows, rows * 2, generator(seed, "add", step), logits=logits)
        seen += size
        assert buffer.num_seen == seen
        assert len(buffer) == min(seen, capacity)
        held = buffer.rows
        assert len(held.unique()) == len(held), "one row twice"
        assert torch.equal(buffer.targets, held * 2), "target left its row"
        drawn = buffer.sample(7, generator(seed, "draw", step))
        assert len(drawn) == min(7, len(buffer))
        assert len(drawn.slots.unique()) == len(drawn)
        assert torch.equal(drawn.payload["logits"][:, 0].long(), drawn.rows), "payload left its row"
    again = Buffer(capacity, payload={"logits": (3,)}, rule=rule)
    again.load_state_dict(buffer.state_dict())
    more = torch.arange(seen, seen + 5)
    for copy in (buffer, again):
        copy.add(more, more * 2, generator(seed, "more"), logits=torch.zeros(5, 3))
    assert torch.equal(buffer.rows, again.rows)
    assert torch.equal(buffer.take(torch.arange(len(buffer))).payload["logits"],
                       again.take(torch.arange(len(again))).payload["logits"])  # fmt: skip


def test_capacity_zero_keeps_and_draws_nothing() -> None:
    buffer = Buffer(0)
    buffer.add(torch.arange(5), torch.zeros(5, dtype=torch.int64), generator(0, "add"))
    assert len(buffer) == 0
    assert len(buffer.sample(3, generator(0, "draw"))) == 0


def test_negative_capacity_and_wrong_payload_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity is -1"):
        Buffer(-1)
    with pytest.raises(ValueError, match="stores"):
        Buffer(3, payload={"logits": (2,)}).add(torch.arange(2), torch.arange(2), generator(0, "add"))


def test_update_and_draw_read_nothing_on_the_host() -> None:
    buffer = Buffer(8, payload={"logits": (2,)})
    rows = torch.arange(10)
    with forbid_host_reads():
        for step in range(3):
            buffer.add(rows, rows, generator(0, "add", step), domain=rows, logits=torch.zeros(10, 2))
            buffer.sample(4, generator(0, "draw", step))


def test_bytes_count_images_labels_and_payload() -> None:
    assert Buffer(10, payload={"logits": (5,)}).num_bytes(3072) == 10 * (3072 + 8 + 20)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'bach' is none of batch, exact"):
        Buffer(10, rule="bach")
