"""Small real parts for learner tests: a store of drawn images, scenarios made by hand, and a driver."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clbench.data.classes import TEST, TRAIN, ClassTable
from clbench.data.reader import Reader
from clbench.data.store import ImageStore
from clbench.evaluator import Evaluator, Schedule
from clbench.learner.learner import Learner
from clbench.learner.resolve import make_method
from clbench.methods.base import Method
from clbench.rng import generator
from clbench.scenarios.model import Group, Scenario, StreamDefaults, Task
from clbench.stream import Stream

PER_CLASS, TEST_PER_CLASS = 12, 6
EVERY_STEP = Schedule(1)


def make_store(num_classes: int = 6, size: int = 6) -> ImageStore:
    """Images of `num_classes` separable classes: a bright row or column each, and noise."""
    rng = generator(0, "tiny-store")
    per = PER_CLASS + TEST_PER_CLASS
    labels = torch.arange(num_classes).repeat_interleave(per)
    images = torch.randint(0, 90, (len(labels), 1, size, size), generator=rng, dtype=torch.uint8)
    for c in range(num_classes):
        line = images[labels == c]
        if c % 2:
            line[:, :, c // 2] += 150
        else:
            line[:, :, :, c // 2] += 150
        images[labels == c] = line
    split = torch.where(torch.arange(len(labels)) % per < PER_CLASS, TRAIN, TEST).to(torch.uint8)
    names = tuple(f"class {c}" for c in range(num_classes))
    classes = ClassTable(names, torch.zeros(num_classes, dtype=torch.int64), torch.full((num_classes,), -1))
    return ImageStore(images, labels, split, classes, "tiny", "0" * 64)


def rows_of(store: ImageStore, classes: Sequence[int], split: int) -> Tensor:
    chosen = torch.isin(store.labels, torch.tensor(classes)) & (store.split == split)
    return chosen.nonzero()[:, 0]


def split_scenario(store: ImageStore, tasks: int = 3, **changes: Any) -> Scenario:
    """Class-incremental, `tasks` tasks of equal size in natural order. Online streams are shuffled once."""
    per_task = len(store.classes) // tasks
    made, groups = [], []
    first_seen = torch.zeros(len(store.classes), dtype=torch.int64)
    position = 0
    for index in range(tasks):
        classes = torch.arange(index * per_task, (index + 1) * per_task)
        rows = rows_of(store, classes.tolist(), TRAIN)
        rows = rows[torch.randperm(len(rows), generator=generator(1, "order", index))]
        made.append(Task(rows, store.labels[rows], classes))
        test = rows_of(store, classes.tolist(), TEST)
        task_setting = changes.get("setting") == "task"
        answers = classes if task_setting else torch.arange(len(store.classes))
        groups.append(Group(f"task {index}", test, store.labels[test], answers, task=index))
        first_seen[classes] = position
        position += len(rows)
    base = Scenario(
        id="tiny@1", datasets=("tiny",), setting="class", tasks=tuple(made), groups=tuple(groups),
        classes=store.classes, first_seen=first_seen, defaults=StreamDefaults(batch_size=5, epochs=2),
    )  # fmt: skip
    return replace(base, **changes)


class Flat(nn.Module):
    """Backbone: pixels through one hidden layer."""

    def __init__(self, pixels: int = 36, width: int = 16) -> None:
        super().__init__()
        self.layer = nn.Linear(pixels, width)
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.layer(images.flatten(1)))


def learner_for(
    scenario: Scenario,
    method: type[Method],
    *,
    store: ImageStore | None = None,
    backbone: Callable[[], nn.Module] = Flat,
    config: Any = None,
    seed: int = 0,
    schedule: Schedule = EVERY_STEP,
    views: dict[str, str] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    checkpoint_steps: int | None = None,
    mask: str | None = None,
) -> Learner:
    """A learner as `clbench.learner.run` would make it, from parts given by hand."""
    store = store or make_store(len(scenario.classes))
    reader = Reader(store, views or {"train": "", "test": ""}, scenario.domains)
    stream = Stream(scenario, reader, seed=seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = backbone()
    made = make_method(method, config if config is not None else method.Config(), network, scenario, stream)
    evaluator = Evaluator(
        scenario, reader, view=made.view, per_group=200, slots=10, seed=seed,
        mask=mask or ("task" if scenario.setting == "task" else method.mask),
    )  # fmt: skip
    return Learner(scenario, stream, made, evaluator, schedule, save=save, checkpoint_steps=checkpoint_steps)


def run(learner: Learner) -> Learner:
    with torch.random.fork_rng([]):
        learner.run()
    return learner


def outcome(learner: Learner) -> dict[str, Any]:
    """All that must not depend on whether a run was killed."""
    return {
        "method": learner.method.state_dict(),
        "evaluator": learner.evaluator.state_dict(),
        "losses": learner.losses.state_dict(),
        "matrix": learner.matrix,
        "predictions": learner.predictions,
        "cursor": learner.at,
        "starts": learner.task_starts,
    }


def equal(a: Any, b: Any) -> bool:
    """Bit equality through containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def assert_survives_kill(make: Callable[..., Learner], at_most: int = 12) -> Learner:
    """Run once whole, with a checkpoint after every step; from each of some checkpoints, read back from bytes, a fresh
    learner must end exactly as the whole run did. Returns the finished whole run."""
    saved: list[bytes] = []

    def save(state: dict[str, Any]) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        saved.append(file.getvalue())

    whole = run(make(save=save, checkpoint_steps=1))
    expected = outcome(whole)
    assert len(saved) > 3
    for data in saved[:: max(len(saved) // at_most, 1)]:
        state = torch.load(io.BytesIO(data), weights_only=True)
        resumed = make()
        resumed.load_state_dict(state)
        result = outcome(run(resumed))
        different = [key for key in expected if not equal(expected[key], result[key])]
        assert not different, f"resumed at {state['cursor']}: {different} differ"
    return whole
