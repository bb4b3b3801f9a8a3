"""The seams that later methods and scenarios stand on, each proved with a throw-away method or scenario.

Every one passes the kill test: a run resumed from any of its checkpoints ends the same to the bit.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import Flat, assert_survives_kill, equal, learner_for, make_store, rows_of, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.data.classes import TEST, TRAIN, ClassTable
from clbench.evaluator import Schedule
from clbench.learner.hostreads import forbid_host_reads
from clbench.memory import Buffer
from clbench.methods.base import Method
from clbench.methods.er import ER
from clbench.methods.finetune import Finetune
from clbench.scenarios.model import Domains, Group, Scenario, StreamDefaults, Task
from clbench.stream import Batch, Cursor, Phase


class Linear(Method):
    """Base of the throw-away methods: one linear head, plain SGD."""

    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self.classifier = nn.Linear(backbone.num_features, setting.num_classes)
        self.optimizer = torch.optim.SGD([*backbone.parameters(), *self.classifier.parameters()], lr=0.2, momentum=0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images, None))

    def update(self, loss: Tensor) -> Mapping[str, Tensor]:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        return self.update(F.cross_entropy(self.forward(batch.images), batch.targets))

    def classify(self, features, allowed, task) -> Tensor:
        return self.classifier(features)


# -- 1: a buffer with payload, and two independent replay draws with raw and augmented views -------------------------
class StoredLogits(Linear):
    """DER++ in small: logits stored with the exemplar; one draw for distillation, another for labels."""

    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self.buffer = Buffer(20, payload={"logits": (setting.num_classes,)}, rule="exact")
        self._seen_draws: list[tuple[Tensor, Tensor]] = []
        self._views: list[tuple[Tensor, Tensor]] = []

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        step, rng, read = batch.at.step, self.setting.rng, self.setting.read
        logits = self.forward(batch.images)
        loss = F.cross_entropy(logits, batch.targets)
        if len(self.buffer):
            first, second = (self.buffer.sample(6, rng("replay", step, draw)) for draw in range(2))
            augmented = read(first.rows, first.domain, "train", rng("view", step, 0))
            raw = read(second.rows, second.domain, "raw")
            self._views.append((augmented, read(first.rows, first.domain, "raw")))
            self._seen_draws.append((first.slots, second.slots))
            loss = loss + F.mse_loss(self.forward(augmented), first.payload["logits"])
            loss = loss + F.cross_entropy(self.forward(raw), second.targets)
        self.buffer.add(batch.rows, batch.targets, rng("add", step), logits=logits)
        return self.update(loss)


def test_stored_logits_and_two_draws() -> None:
    scenario = split_scenario(make_store())
    whole = assert_survives_kill(
        partial(learner_for, scenario, StoredLogits, views={"train": "pad_crop(2) flip", "test": ""})
    )
    method = whole.method
    assert any(not torch.equal(a, b) for a, b in method._seen_draws), "both draws are always the same"
    assert any(not torch.equal(a, b) for a, b in method._views), "the train view never augments"
    held = method.buffer.take(torch.arange(20))
    assert (held.payload["logits"].abs().sum(1) > 0).all()


# -- 2: per-task batch norm with task ids ----------------------------------------------------------------------------
class TaskNorms(Linear):
    """One batch norm per task, chosen by the task id in training and at test."""

    settings = frozenset({"task"})

    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self.norms = nn.ModuleList(nn.BatchNorm1d(backbone.num_features, affine=False) for _ in setting.task_classes)
        self._asked: set[int | None] = set()

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        features = self.norms[batch.at.task](self.backbone(batch.images))
        return self.update(F.cross_entropy(self.classifier(features), batch.targets))

    def features(self, images: Tensor, task: int | None) -> Tensor:
        self._asked.add(task)
        return self.norms[task](self.backbone(images))


def test_per_task_norm_with_task_ids() -> None:
    scenario = split_scenario(make_store(), setting="task")
    whole = assert_survives_kill(partial(learner_for, scenario, TaskNorms))
    assert whole.method._asked == {0, 1, 2}
    norms = whole.method.norms
    assert all(int(norm.num_batches_tracked) == 10 for norm in norms), "evaluation moved a norm, or training missed one"
    # answers only from the group's own task: never a class of another
    start = 0
    for group in scenario.groups:
        predicted = whole.predictions[-1][start : start + len(group.rows)]
        assert set(predicted.tolist()) <= set(group.classes.tolist())
        start += len(group.rows)


# -- 3: classes that unlock inside a task ----------------------------------------------------------------------------
class Watching(Linear):
    """Notes what it is told to be seen, and may not answer anything else."""

    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self._told: list[tuple[int, list[int]]] = []

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        self._told.append((batch.at.step, batch.seen.nonzero()[:, 0].tolist()))
        logits = self.forward(batch.images).masked_fill(~batch.seen, -torch.inf)
        return self.update(F.cross_entropy(logits, batch.targets))


def blurry_scenario() -> Scenario:
    """Two online tasks; class 3 leaks into task 0 at its 17th sample, class 5 comes in the middle of task 1."""
    store = make_store()
    own = [rows_of(store, [0, 1, 2], TRAIN), rows_of(store, [4], TRAIN)]
    leaked, late = rows_of(store, [3], TRAIN), rows_of(store, [5], TRAIN)
    first = torch.cat([own[0][:16], leaked[:1], own[0][16:]])
    second = torch.cat([own[1], late, leaked[1:]])
    tasks = tuple(Task(rows, store.labels[rows], store.labels[rows].unique()) for rows in (first, second))
    stream = torch.cat([first, second])
    first_seen = torch.stack([(store.labels[stream] == c).nonzero()[0, 0] for c in range(6)])
    groups = tuple(
        Group(f"class {c}", rows_of(store, [c], TEST), torch.full((6,), c), torch.arange(6)) for c in range(6)
    )
    return Scenario(
        "blurry@1", ("tiny",), "class", tasks, groups, store.classes, first_seen, online=True,
        defaults=StreamDefaults(batch_size=5),
    )  # fmt: skip


def test_classes_unlock_inside_a_task() -> None:
    scenario = blurry_scenario()
    whole = assert_survives_kill(partial(learner_for, scenario, Watching))
    stream = torch.cat([t.rows for t in scenario.tasks])
    labels = make_store().labels
    size = len(scenario.tasks[0].rows)
    ends = [min(5 * (i + 1), size) for i in range(-(-size // 5))]
    ends += [size + min(5 * (i + 1), len(stream) - size) for i in range(-(-(len(stream) - size) // 5))]
    for (step, told), end in zip(whole.method._told, ends, strict=True):
        assert told == sorted(set(labels[stream[:end]].tolist())), f"step {step}"
    # the evaluator counts a class exactly from the batch on that first shows it
    for (step, _, _, _), active in zip(whole.evaluator.points[1:], whole.evaluator.active[1:], strict=True):
        assert list(active) == whole.method._told[step - 1][1]


# -- 4: two label levels with parent links ---------------------------------------------------------------------------
def level_scenario() -> Scenario:
    """Task 0 shows coarse labels (ids 6 and 7), task 1 the same images with fine ones; a group per level."""
    store = make_store()
    parent = torch.tensor([6, 6, 6, 7, 7, 7, -1, -1])
    classes = ClassTable((*store.classes.names, "low", "high"), torch.tensor([1] * 6 + [0] * 2), parent)
    rows, test = rows_of(store, range(6), TRAIN), rows_of(store, range(6), TEST)
    fine, coarse = torch.arange(6), torch.tensor([6, 7])
    tasks = (
        Task(rows, parent[store.labels[rows]], coarse),
        Task(rows.flip(0), store.labels[rows.flip(0)], fine),
    )
    groups = (
        Group("coarse", test, parent[store.labels[test]], coarse, level=0),
        Group("fine", test, store.labels[test], fine, level=1),
    )
    first_seen = torch.tensor([len(rows)] * 6 + [0, 0])
    return Scenario(
        "levels@1",
        ("tiny",),
        "class",
        tasks,
        groups,
        classes,
        first_seen,
        defaults=StreamDefaults(batch_size=6, epochs=3),
    )


def test_two_label_levels() -> None:
    scenario = level_scenario()
    whole = assert_survives_kill(partial(learner_for, scenario, Linear, store=make_store()))
    assert len(scenario.classes) == whole.method.setting.num_classes == 8
    assert scenario.classes.num_levels == 2
    valid = whole.evaluator.state_dict()["valid"]
    tasks = torch.tensor([task for _, task, _, _ in whole.evaluator.points])
    assert valid[tasks == 0].tolist() == [[True, False]] * int((tasks == 0).sum()), "fine labels before they open"
    assert valid[tasks == 1].all()
    half = len(scenario.groups[0].rows)
    assert set(whole.predictions[-1][:half].tolist()) <= {6, 7}, "a coarse question got a fine answer"
    assert set(whole.predictions[-1][half:].tolist()) <= set(range(6))
    coarse = whole.matrix[0][1][0] / half
    assert coarse > 0.7, "the coarse level is learnable and was not learned"


# -- 5: rows seen through a permutation domain -----------------------------------------------------------------------
def permuted_scenario() -> Scenario:
    store = make_store()
    rows, test = rows_of(store, range(6), TRAIN), rows_of(store, range(6), TEST)
    table = torch.stack([torch.arange(36), torch.arange(35, -1, -1)])
    tasks = tuple(
        Task(rows, store.labels[rows], torch.arange(6) if d == 0 else torch.empty(0, dtype=torch.int64),
             domain=torch.full_like(rows, d))
        for d in range(2)
    )  # fmt: skip
    groups = tuple(
        Group(f"domain {d}", test, store.labels[test], torch.arange(6), task=d, domain=torch.full_like(test, d))
        for d in range(2)
    )
    return Scenario(
        "permuted@1", ("tiny",), "domain", tasks, groups, store.classes, torch.zeros(6, dtype=torch.int64),
        defaults=StreamDefaults(batch_size=6, epochs=2), domains=Domains("permutation", table),
    )  # fmt: skip


class Seeing(Linear):
    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self._batches: list[Batch] = []

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        self._batches.append(batch)
        return super().step(batch)


def test_rows_are_seen_through_their_domain() -> None:
    scenario = permuted_scenario()
    whole = assert_survives_kill(partial(learner_for, scenario, Seeing))
    store = make_store()
    for batch in whole.method._batches:
        plain = store.images[batch.rows].flatten(1).float() / 255
        shown = batch.images.flatten(1)
        assert batch.domain is not None
        expected = torch.where(batch.domain[:, None] == 1, plain.flip(1), plain)
        assert torch.allclose(shown, expected)
    assert {int(b.domain[0]) for b in whole.method._batches} == {0, 1}
    groups = whole.evaluator.state_dict()["valid"]
    assert groups[0].tolist() == [True, False], "a domain is tested before its task"


def test_replayed_rows_keep_their_domain() -> None:
    learner = run(learner_for(permuted_scenario(), ER, config=ER.Config(capacity=30, replay_batch_size=4)))
    drawn = learner.method.buffer.take(torch.arange(30))
    assert drawn.domain is not None
    assert set(drawn.domain.tolist()) == {0, 1}


# -- 6: several updates per batch ------------------------------------------------------------------------------------
def test_three_updates_per_batch() -> None:
    store = make_store()
    scenario = split_scenario(store, online=True, defaults=StreamDefaults(batch_size=5, updates_per_batch=3))
    whole = assert_survives_kill(partial(learner_for, scenario, Seeing, views={"train": "pad_crop(1)", "test": ""}))
    batches = whole.method._batches
    assert len(batches) == 3 * 3 * 5
    for first in range(0, len(batches), 3):
        three = batches[first : first + 3]
        assert [b.at.update for b in three] == [0, 1, 2]
        assert [b.last_update for b in three] == [False, False, True]
        assert all(torch.equal(b.rows, three[0].rows) for b in three)
        assert not torch.equal(three[0].images, three[1].images), "every update draws its own view"
    assert torch.equal(torch.cat([b.rows for b in batches[::3]]), torch.cat([t.rows for t in scenario.tasks]))
    memory = run(learner_for(scenario, ER, config=ER.Config(capacity=9))).method.buffer
    assert memory.num_seen == 72, "the buffer sees each sample once, whatever the number of updates"


# -- 7: early stopping at an epoch's end -----------------------------------------------------------------------------
class StopsEarly(Linear):
    """Stops task t after t + 1 epochs, by a counter that a resume must bring back."""

    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self.epochs_done = 0

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        return [Phase("train", epochs=5), Phase("again", epochs=1)]

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        self.epochs_done = 0

    def end_epoch(self, task: Task, phase: Phase, at: Cursor) -> bool:
        self.epochs_done += 1
        return phase.name == "train" and self.epochs_done > at.task


def test_early_stopping_at_an_epoch_end() -> None:
    whole = assert_survives_kill(partial(learner_for, split_scenario(make_store()), StopsEarly), at_most=40)
    per_epoch = 5
    assert whole.task_starts == [0, 2 * per_epoch, 5 * per_epoch]
    assert whole.at.step == 9 * per_epoch


# -- 8: a phase that draws its own inputs ----------------------------------------------------------------------------
class Dreams(Linear):
    """After training, a phase on points of its own around class means, from generators keyed by the cursor."""

    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self.sums = torch.zeros(setting.num_classes, backbone.num_features)
        self.counts = torch.zeros(setting.num_classes)

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        return [Phase("train", epochs=1), Phase("statistics", epochs=1, order="listed", view="test"),
                Phase("dream", source="none", iterations=7)]  # fmt: skip

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        if batch.phase.name == "statistics":
            with torch.no_grad():
                self.sums.index_add_(0, batch.targets, self.features(batch.images, None))
                self.counts.index_add_(0, batch.targets, torch.ones(len(batch.targets)))
            return {}
        if batch.phase.name == "dream":
            assert len(batch.rows) == 0
            rng = self.setting.rng("dream", batch.at.step)
            targets = torch.randint(0, 2, (8,), generator=rng) + 2 * batch.at.task
            means = self.sums[targets] / self.counts[targets, None]
            points = means + 0.1 * torch.randn(means.shape, generator=rng)
            return self.update(F.cross_entropy(self.classifier(points), targets))
        return super().step(batch)


def test_a_phase_that_draws_its_own_inputs() -> None:
    whole = assert_survives_kill(partial(learner_for, split_scenario(make_store()), Dreams), at_most=30)
    assert whole.at.step == 3 * (5 + 5 + 7)
    assert whole.method.counts.tolist() == [12.0] * 6
    assert {phase for _, _, phase, _ in whole.evaluator.points} == {0, 1, 2}, "every phase is evaluated"


# -- 9: deployed weights that differ from the live ones --------------------------------------------------------------
class Averaged(Linear):
    """Answers for the record with an exponential average of its weights; the curve shows the live ones."""

    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self.average = [p.detach().clone() for p in self.classifier.parameters()]
        self._used = 0

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        out = super().step(batch)
        with torch.no_grad():
            for mean, live in zip(self.average, self.classifier.parameters(), strict=True):
                mean.lerp_(live, 0.02)
        return out

    @contextlib.contextmanager
    def deployed(self) -> Iterator[None]:
        live = [p.detach().clone() for p in self.classifier.parameters()]
        self._used += 1
        with torch.no_grad():
            for p, mean in zip(self.classifier.parameters(), self.average, strict=True):
                p.copy_(mean)
        yield
        with torch.no_grad():
            for p, back in zip(self.classifier.parameters(), live, strict=True):
                p.copy_(back)


def test_deployed_weights_differ_from_live_ones() -> None:
    scenario = split_scenario(make_store())
    whole = assert_survives_kill(partial(learner_for, scenario, Averaged))
    plain = run(learner_for(scenario, Linear))
    assert torch.equal(whole.evaluator.drain()["hits"], plain.evaluator.drain()["hits"]), "the curve shows live weights"
    assert not torch.equal(whole.predictions[-1], plain.predictions[-1]), "the matrix shows deployed ones"
    assert whole.method._used == 3


# -- 10: dropout and methods that draw from the global generator -----------------------------------------------------
class Dropped(Flat):
    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(super().forward(images), 0.3, self.training)


def test_global_draws_are_functions_of_the_cursor() -> None:
    before = torch.random.get_rng_state()
    assert_survives_kill(partial(learner_for, split_scenario(make_store()), Linear, backbone=Dropped))
    assert torch.equal(before, torch.random.get_rng_state()), "a run moved the caller's generator"


# -- what holds for all ----------------------------------------------------------------------------------------------
ALL = [
    ("stored logits", lambda: split_scenario(make_store()), StoredLogits),
    ("task norms", lambda: split_scenario(make_store(), setting="task"), TaskNorms),
    ("unlocking", blurry_scenario, Linear),
    ("levels", level_scenario, Linear),
    ("permuted", permuted_scenario, Linear),
    ("early stop", lambda: split_scenario(make_store()), StopsEarly),
    ("own inputs", lambda: split_scenario(make_store()), Dreams),
    ("deployed", lambda: split_scenario(make_store()), Averaged),
    ("er", lambda: split_scenario(make_store()), ER),
    ("finetune", lambda: split_scenario(make_store()), Finetune),
]


@pytest.mark.parametrize(("scenario", "method"), [case[1:] for case in ALL], ids=[case[0] for case in ALL])
def test_no_host_read_per_iteration(scenario, method) -> None:
    learner = learner_for(scenario(), method, store=make_store())
    learner.guard = forbid_host_reads
    run(learner)
    assert learner.evaluator.points


@pytest.mark.parametrize(("scenario", "method"), [case[1:] for case in ALL], ids=[case[0] for case in ALL])
def test_evaluation_does_not_disturb(scenario, method) -> None:
    states = [
        run(
            learner_for(scenario(), method, store=make_store(), schedule=schedule, backbone=Dropped)
        ).method.state_dict()
        for schedule in (Schedule(0), Schedule(10), Schedule(1))
    ]
    assert equal(states[0], states[1])
    assert equal(states[0], states[2])


def test_levels_of_an_empty_first_task() -> None:
    """A task without rows (Si-Blurry has them) has no step, and its evaluation still takes place."""
    scenario = split_scenario(make_store())
    empty = torch.empty(0, dtype=torch.int64)
    tasks = (Task(empty, empty, empty), *scenario.tasks)
    groups = tuple(group._replace(task=group.task + 1) for group in scenario.groups)
    learner = run(learner_for(replace(scenario, tasks=tasks, groups=groups), Linear))
    assert learner.task_starts[:2] == [0, 0]
    assert len(learner.matrix) == 4
