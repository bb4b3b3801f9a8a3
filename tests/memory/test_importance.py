"""The importance memory against a plain list that follows CLIB's rules one sample at a time, and its invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.learner.hostreads import forbid_host_reads
from clbench.memory.importance import EQUAL, ImportanceMemory, least_important, updated_importance
from clbench.rng import generator


class Plain:
    """CLIB's memory as the hle card (1.4, 5.6) and the released code have it: lists, one sample at a time."""

    def __init__(self, capacity: int, decay: float = 0.9) -> None:
        self.capacity, self.decay = capacity, decay
        self.rows: list[int] = []
        self.targets: list[int] = []
        self.importance: list[float] = []
        self.met: list[int] = []  # classes in order of appearance
        self.members: dict[int, list[int]] = {}  # slots of a class, in order of arrival
        self.drawn: list[int] = []
        self.changed: set[int] = set()
        self.losses: list[float] = []

    def add(self, row: int, target: int) -> None:
        if target not in self.met:
            self.met.append(target)
            self.members[target] = []
        if len(self.rows) < self.capacity:
            slot = len(self.rows)
            self.rows.append(row)
            self.targets.append(target)
            others = [self.importance[s] for s in self.members[target]]
            self.importance.append(math.fsum(others) / len(others) if others else 0.0)
        else:
            held = [c for c in self.met if self.members[c]]
            largest = max(held, key=lambda c: len(self.members[c]) + (c == target))  # the first of equal ones
            least = min(self.importance[s] for s in self.members[largest])
            slot = next(s for s in self.members[largest] if self.importance[s] <= least + EQUAL)
            self.members[largest].remove(slot)
            others = [self.importance[s] for s in self.members[target]]
            pool = others or self.importance
            self.importance[slot] = math.fsum(pool) / len(pool)
            self.rows[slot], self.targets[slot] = row, target
        self.members[target].append(slot)
        self.changed.add(slot)

    def refresh(self, losses: list[float]) -> None:
        kept = [s for s in range(len(self.losses)) if s not in self.changed]
        change = math.fsum(losses[s] - self.losses[s] for s in kept) / max(len(kept), 1)
        if self.drawn:
            mean = math.fsum(self.importance[s] for s in self.drawn) / len(self.drawn)
            for slot in set(self.drawn):
                self.importance[slot] -= (1 - self.decay) * (change - mean / len(self.drawn))
        self.losses, self.drawn, self.changed = list(losses), [], set()


@settings(max_examples=30, deadline=None)
@given(
    capacity=st.integers(1, 12),
    num_classes=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    every=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_follows_the_rules_sample_by_sample(
    capacity: int, num_classes: int, sizes: list[int], every: int, seed: int
) -> None:
    memory, plain = ImportanceMemory(capacity, num_classes), Plain(capacity)
    rng, row = generator(seed, "test"), 0
    for step, size in enumerate(sizes):
        targets = torch.randint(num_classes, (size,), generator=rng)
        rows = torch.arange(row, row + size)
        row += size
        memory.add(rows, targets)
        for r, t in zip(rows.tolist(), targets.tolist(), strict=True):
            plain.add(r, t)
        drawn = memory.sample(4, rng)
        memory.mark(drawn.slots)
        plain.drawn += drawn.slots.tolist()
        if step % every == 0:
            losses = torch.rand(len(memory), generator=rng, dtype=torch.float64)
            memory.refresh(losses)
            plain.refresh(losses.tolist())
        assert memory.rows.tolist() == plain.rows
        assert memory.targets.tolist() == plain.targets
        assert memory.importance.tolist() == pytest.approx(plain.importance, rel=1e-9, abs=1e-12)
        assert len(memory) <= capacity
        assert memory.counts.tolist() == torch.bincount(memory.targets, minlength=num_classes).tolist()


def filled(targets: list[int], importance: list[float], **options) -> ImportanceMemory:
    """A full memory of these exemplars, rows 0, 1, ..."""
    memory = ImportanceMemory(len(targets), 6, **options)
    memory.add(torch.arange(len(targets)), torch.tensor(targets))
    memory._importance.copy_(torch.tensor(importance))
    return memory


def test_the_largest_class_loses_its_least_important() -> None:
    memory = filled([0, 1, 1, 1, 2], [-9.0, 0.3, 0.1, 0.2, -9.0])
    memory.add(torch.tensor([50]), torch.tensor([2]))
    assert memory.rows.tolist() == [0, 1, 50, 3, 4]
    assert memory.counts.tolist() == [1, 2, 2, 0, 0, 0]
    assert memory.importance[2] == -9.0  # the mean of the others of its class


def test_the_arriving_sample_counts_for_its_class() -> None:
    """Two classes of two: the one that a third arrives for is the largest, although it was met last."""
    memory = filled([0, 0, 1, 1], [0.1, 0.2, 0.4, 0.3])
    memory.add(torch.tensor([50]), torch.tensor([1]))
    assert memory.rows.tolist() == [0, 1, 2, 50]


def test_of_equal_classes_the_one_met_first_loses_and_of_equal_importance_the_oldest() -> None:
    memory = filled([3, 3, 1, 1], [0.0, 0.0, 0.0, 0.0])
    memory.add(torch.tensor([50]), torch.tensor([5]))
    assert memory.rows.tolist() == [50, 1, 2, 3]
    assert int(least_important(torch.zeros(3), torch.tensor([7, 2, 5]), torch.tensor([True, False, True]))) == 2


def test_related_classes_may_lose_in_place_of_the_largest() -> None:
    """Class 0 is the largest, but class 3, which is related to it, holds the least important exemplar."""
    related = torch.arange(6)[:, None].repeat(1, 2)
    related[0, 1] = 3
    memory = filled([0, 0, 0, 3, 4], [0.5, 0.4, 0.6, 0.1, -1.0])
    memory.add(torch.tensor([50]), torch.tensor([4]), related=related)
    assert memory.rows.tolist() == [0, 1, 2, 50, 4]
    memory = filled([0, 0, 0, 3, 4], [0.5, 0.4, 0.6, 0.1, -1.0])
    memory.add(torch.tensor([50]), torch.tensor([4]))
    assert memory.rows.tolist() == [0, 50, 2, 3, 4]


def test_a_class_that_holds_nothing_gives_nothing() -> None:
    """Capacity 2 for 3 classes: class 0 was met first but has been evicted; it must not be asked again."""
    memory = ImportanceMemory(2, 3)
    for target in (0, 1, 2, 0, 1, 2, 0):
        memory.add(torch.tensor([target]), torch.tensor([target]))
        assert int(memory.counts.sum()) == len(memory)
        assert target in memory.targets.tolist()


def test_importance_is_what_others_lose_by_it() -> None:
    """Losses of the two exemplars that stayed fall by 1; the exemplar trained on gains a tenth of that."""
    memory = filled([0, 0, 0], [0.0, 0.0, 0.0])
    memory.refresh(torch.tensor([3.0, 3.0, 3.0]))
    memory.mark(torch.tensor([1]))
    memory.add(torch.tensor([9]), torch.tensor([0]))  # takes slot 0, whose loss has no past then
    memory.refresh(torch.tensor([99.0, 2.0, 2.0]))
    assert memory.importance.tolist() == pytest.approx([0.0, 0.1, 0.0])


def test_the_two_update_rules() -> None:
    """Card 5.6: the released estimate divides the mean once more, and adds where an average would subtract."""
    importance, draws = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64), torch.tensor([2, 1, 0])
    mean = (2 * 1 + 3) / 3
    change = torch.tensor(-0.5, dtype=torch.float64)
    released = updated_importance(importance, draws, change, 0.9, "released")
    assert released.tolist() == pytest.approx([1 + 0.1 * (0.5 + mean / 3), 3 + 0.1 * (0.5 + mean / 3), 7])
    intended = updated_importance(importance, draws, change, 0.9, "intended")
    assert intended.tolist() == pytest.approx([1 + 0.1 * (0.5 - mean), 3 + 0.1 * (0.5 - mean), 7])
    constant = torch.full((3,), 0.5, dtype=torch.float64)  # already the fall: an average stays
    assert updated_importance(constant, draws, change, 0.9, "intended").tolist() == pytest.approx([0.5] * 3)


def test_nothing_is_read_on_the_host() -> None:
    memory, related = ImportanceMemory(4, 3), torch.zeros((3, 2), dtype=torch.int64)
    rows, targets = torch.arange(7), torch.tensor([0, 1, 1, 2, 0, 0, 1])
    with forbid_host_reads():
        memory.add(rows, targets, domain=torch.zeros(7, dtype=torch.int64))
        memory.mark(memory.sample(3, generator(0, "test")).slots, torch.tensor([True, False, True]))
        memory.refresh(torch.ones(4))
        memory.add(rows, targets, related=related)
    assert memory.sample(9, generator(0, "test")).domain is not None


def test_state_is_complete() -> None:
    """From any point a restored memory goes on as the original does."""

    def play(memory: ImportanceMemory, start: int, end: int) -> ImportanceMemory:
        for step in range(start, end):
            rng = generator(3, "step", step)
            memory.add(torch.randint(99, (3,), generator=rng), torch.randint(4, (3,), generator=rng))
            memory.mark(memory.sample(5, rng).slots)
            if step % 2:
                memory.refresh(torch.rand(len(memory), generator=rng))
        return memory

    whole = play(ImportanceMemory(8, 4), 0, 9).state_dict()
    for cut in range(9):
        memory = ImportanceMemory(8, 4)
        memory.load_state_dict(play(ImportanceMemory(8, 4), 0, cut).state_dict())
        ended = play(memory, cut, 9).state_dict()
        for name, value in whole.items():
            assert torch.equal(torch.as_tensor(ended[name]), torch.as_tensor(value)), (cut, name)


def test_capacity_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        ImportanceMemory(0, 3)


def test_bytes_count_images_labels_and_importance() -> None:
    assert ImportanceMemory(10, 3).num_bytes(3072) == 10 * (3072 + 16)
