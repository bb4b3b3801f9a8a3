"""Engines: the same hits and the same weights, on the living method or from a snapshot; what a snapshot shares."""

import copy
from collections import namedtuple
from threading import Lock

import pytest
import torch
from tiny import Flat, equal, learner_for, make_store, outcome, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError, RunFailed
from clbench.evaluator import Schedule
from clbench.evaluator.chunks import CANDIDATES, measured_chunk
from clbench.evaluator.engine import make_engine
from clbench.evaluator.heads import head_counts_reference
from clbench.evaluator.snapshot import Snapshot
from clbench.learner.check import finished, weights
from clbench.learner.hostreads import forbid_host_reads
from clbench.learner.learner import Learner
from clbench.learner.spec import RunSpec
from clbench.methods.base import Method, freeze
from clbench.methods.er import ER
from clbench.methods.finetune import Finetune
from clbench.methods.registry import find

CPU = torch.device("cpu")


class WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_features = 16
        self.layer, self.norm, self.drop = nn.Linear(36, 16), nn.BatchNorm1d(16), nn.Dropout(0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.norm(self.layer(images.flatten(1))))


def made(engine: str, every: int = 1, **changes) -> Learner:
    learner = learner_for(
        split_scenario(make_store(), **changes), ER, backbone=WithNorm, schedule=Schedule(every)
    )  # fmt: skip
    learner.evaluator.engine = make_engine(engine, CPU)
    return learner


@pytest.mark.parametrize("setting", ["class", "task"])
@pytest.mark.parametrize("online", [False, True])
def test_weights_are_the_same_with_evaluation_off_on_and_from_a_snapshot(setting: str, online: bool) -> None:
    off = run(made("plain", 0, setting=setting, online=online))
    plain = run(made("plain", setting=setting, online=online))
    beside = run(made("snapshot", setting=setting, online=online))
    assert equal(outcome(plain), outcome(beside)), "weights, curve, matrix and predictions"
    assert equal(off.method.state_dict(), beside.method.state_dict())
    assert beside.evaluator.engine.launched == len(beside.evaluator.points)


def test_a_snapshot_survives_a_resume() -> None:
    whole = outcome(run(made("snapshot")))
    states = []
    learner = made("snapshot")
    learner._save, learner._checkpoint_steps = lambda state: states.append(copy.deepcopy(state)), 7
    run(learner)
    for state in states[::3]:
        resumed = made("snapshot")
        resumed.load_state_dict(state)
        assert equal(outcome(run(resumed)), whole)


@pytest.mark.parametrize("engine", ["plain", "snapshot"])
def test_no_engine_reads_the_host(engine: str) -> None:
    learner = made(engine)
    learner.guard = forbid_host_reads
    run(learner)


def spec_of(name: str, **changes) -> RunSpec:
    found = find(name)
    backbone = None if found.cls.frozen_backbone is True else found.cls.small_backbone
    return RunSpec(
        method=name,
        scenario="split-digits",
        scenario_params={"per_class": 24, **({} if "class" in found.cls.settings else {"setting": "task"})},
        epochs=1, eval_every=2, eval_per_group=20, device="cpu", train_view="", test_view="",
        backbone=backbone, backbone_options={"nf": 4} if backbone == "reduced-resnet18" else {}, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["er", "nmc", "slca"])
def test_hits_from_heads_are_hits_from_logits(name: str) -> None:
    learner = finished(spec_of(name))
    evaluator, method = learner.evaluator, learner.method
    assert method.head(None) is not None
    at, end = len(evaluator.points), learner.scenario.offsets[-1]
    last = len(learner.scenario.tasks) - 1
    evaluator.observe(method, last, 0, 10_001, end)
    evaluator.head_counts = head_counts_reference
    evaluator._chosen.clear()
    evaluator.observe(method, last, 0, 10_002, end)
    hits = evaluator.drain(at)["hits"]
    assert int(hits[0].sum()) > 0
    assert torch.equal(hits[0], hits[1])


def test_hits_from_heads_under_one_mask_per_group() -> None:
    plain = run(learner_for(split_scenario(make_store()), ER, mask="task"))
    fused = learner_for(split_scenario(make_store()), ER, mask="task")
    fused.evaluator.head_counts = head_counts_reference
    run(fused)
    assert torch.equal(plain.evaluator.drain()["hits"], fused.evaluator.drain()["hits"])


# -- what a snapshot holds ---------------------------------------------------------------------------------------------
Pair = namedtuple("Pair", "left right")


class Memory:
    """Something a method keeps that is no module."""

    def __init__(self) -> None:
        self.table = torch.zeros(3)
        self.count = 0


class Rich(Method):
    """Keeps what it answers with in every way there is."""

    def __init__(self) -> None:
        self.setting = self.config = object()
        self.backbone = WithNorm().train()
        self.frozen = freeze(nn.Linear(2, 2))
        self.tied = self.backbone.layer
        self.optimizer = torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9)
        self.mean = torch.zeros(4)
        self.part = self.mean[1:3]  # a view: it moves with `mean`
        self.parts = [torch.zeros(2), {"deep": torch.zeros(2)}]
        self.pair = Pair(torch.zeros(2), 1)
        self.memory = Memory()
        self.step_count = 0
        self.late = None
        self._graph = (torch.ones(2, requires_grad=True) * 2).sum()
        self._answer = self.answer  # a method of its own

    def answer(self) -> Tensor:
        return self.mean


def test_a_snapshot_follows_every_value() -> None:
    method = Rich()
    snapshot = Snapshot(method)
    shadow = snapshot.copy
    assert shadow.optimizer is method.optimizer
    assert shadow.frozen is not method.frozen
    assert shadow.frozen.weight.data_ptr() == method.frozen.weight.data_ptr(), "no memory for what never changes"
    assert shadow.tied is shadow.backbone.layer
    assert shadow.tied is not method.tied
    assert shadow._answer.__self__ is shadow
    assert method.backbone.training
    assert method.backbone.norm.training
    assert not any(m.training for m in shadow.backbone.modules())
    F.mse_loss(method.backbone(torch.randn(8, 1, 6, 6)), torch.zeros(8, 16)).backward()
    method.optimizer.step()
    method.mean += 1
    method.parts[0] += 1
    method.parts[1]["deep"] = torch.ones(2)  # a new tensor
    method.pair = Pair(torch.ones(2), 2)
    method.memory.table += 1
    method.memory.count = 5
    method.step_count = 7
    method.late = torch.ones(3)
    assert shadow.mean.sum() == 0, "not before it is refreshed"
    before = {name: (id(value), value.clone()) for name, value in shadow.backbone.state_dict(keep_vars=True).items()}
    snapshot.refresh()
    for name, value in method.backbone.state_dict().items():
        now = shadow.backbone.state_dict(keep_vars=True)[name]
        assert torch.equal(now, value)
        assert id(now) == before[name][0], "a captured graph would read the old place"
    assert torch.equal(shadow.mean, method.mean)
    assert torch.equal(shadow.part, method.part)
    assert shadow.parts[0].sum() == shadow.parts[1]["deep"].sum() == shadow.pair.left.sum() == 2
    assert shadow.memory.table.sum() == 3
    assert (shadow.pair.right, shadow.memory.count, shadow.step_count) == (2, 5, 7)
    assert torch.equal(shadow.late, torch.ones(3))
    assert shadow.late is not method.late
    assert ("step_count", 7) in snapshot.plain()


def test_a_snapshot_follows_names_that_change_places() -> None:
    method = Rich()
    snapshot = Snapshot(method)
    method.mean, method.late = torch.full((4,), 2.0), method.mean  # the old one has another name, the new one its name
    snapshot.refresh()
    assert snapshot.copy.mean.tolist() == [2.0] * 4
    assert snapshot.copy.late.tolist() == [0.0] * 4
    method.mean, method.late = method.late, method.mean
    method.mean += 5
    snapshot.refresh()
    assert snapshot.copy.mean.tolist() == [5.0] * 4
    assert snapshot.copy.late.tolist() == [2.0] * 4


def test_tensors_of_a_module_that_lie_elsewhere_need_a_new_snapshot() -> None:
    method = Rich()
    snapshot = Snapshot(method)
    assert snapshot.fits()
    method.tied.weight.data = torch.ones(16, 36)
    assert not snapshot.fits()
    assert Snapshot(method).fits()


def test_a_module_that_appears_inside_a_phase_is_named() -> None:
    method = Rich()
    snapshot = Snapshot(method)
    method.late = nn.Linear(2, 2)
    with pytest.raises(RunFailed, match="module late of Rich is new inside a phase"):
        snapshot.refresh()


def test_what_cannot_be_copied_is_named() -> None:
    method = Rich()
    method._lock = Lock()
    with pytest.raises(RunFailed, match=r"Rich keeps something that cannot be copied .*use --evaluator plain"):
        Snapshot(method)


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="CUDA device"):
        make_engine("graph", CPU)


# -- rows of one forward pass ------------------------------------------------------------------------------------------
def test_the_quickest_chunk_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    cost = {16: 10.0, 32: 7.0, 64: 5.0, 128: 4.9, 256: 6.0, 512: 7.0, 1024: 1.0, 2048: 1.0}  # per row
    asked = []

    def forward(rows: int) -> None:
        nonlocal now
        asked.append(rows)
        now += cost[rows] * rows

    monkeypatch.setattr("clbench.evaluator.chunks.time.perf_counter", lambda: now)
    assert measured_chunk(forward, 5000, CPU) == 64, "128 is not clearly better; 1024 is behind two worse ones"
    assert max(asked) == 512
    cost[100] = 1.0
    assert measured_chunk(forward, 100, CPU) == 128, "no more rows than there are"


def test_a_measured_chunk_changes_no_hit_and_is_kept() -> None:
    learner = learner_for(split_scenario(make_store()), Finetune, backbone=Flat)
    chunk = learner.evaluator.measure_chunk(learner.method)
    assert chunk in CANDIDATES
    assert all(m.training for m in learner.method.backbone.modules())
    plain = run(learner_for(split_scenario(make_store()), Finetune, backbone=Flat))
    run(learner)
    assert torch.equal(plain.evaluator.drain()["hits"], learner.evaluator.drain()["hits"])
    other = learner_for(split_scenario(make_store()), Finetune, backbone=Flat)
    other.load_state_dict(learner.state_dict())
    assert other.evaluator.chunk == chunk
    state = learner.evaluator.state_dict()
    del state["chunk"]  # a checkpoint of schema version 2
    other = learner_for(split_scenario(make_store()), Finetune, backbone=Flat).evaluator
    rule = other.chunk
    other.load_state_dict(state)
    assert other.chunk == rule


def test_options_that_do_not_fit_are_refused() -> None:
    for option in ({"evaluator": "graph"}, {"fused": True}, {"cuda_graph": True}):
        with pytest.raises(InputError, match="CUDA device"):
            finished(spec_of("finetune", **option))


# -- on the device -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["er", "finetune"])
def test_weights_and_hits_on_the_device(name: str) -> None:
    """Final weights bit-identical with the evaluator off, on, on a side stream and as graphs."""
    from clbench.learner.run import exact_arithmetic

    digests, hits = {}, {}
    with exact_arithmetic(torch.device("cuda")):
        for how in ("off", "plain", "snapshot", "graph"):
            changes = {"device": "cuda", "evaluator": "plain" if how == "off" else how}
            changes["eval_every"] = 0 if how == "off" else 1
            learner = finished(spec_of(name).model_copy(update=changes))
            digests[how] = weights(learner)
            if how != "off":
                hits[how] = learner.evaluator.drain()["hits"]
            if how == "graph":
                assert learner.evaluator.engine.replayed > learner.evaluator.engine.launched
    assert len(set(digests.values())) == 1, digests
    assert torch.equal(hits["plain"], hits["snapshot"])
    assert torch.equal(hits["plain"], hits["graph"])


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["plain", "snapshot", "graph"])
@pytest.mark.parametrize("fused", [False, True])
def test_an_observation_never_waits_for_the_device(engine: str, fused: bool) -> None:
    learner = finished(spec_of("er").model_copy(update={"device": "cuda", "evaluator": engine, "fused": fused}))
    evaluator, end = learner.evaluator, learner.scenario.offsets[-1]
    last = len(learner.scenario.tasks) - 1
    for step in range(3):  # first launch, capture, first replay: these may wait
        evaluator.observe(learner.method, last, 0, 20_000 + step, end)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            evaluator.observe(learner.method, last, 0, 30_000 + step, end)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    latest = evaluator.drain(len(evaluator.points) - 5)["hits"]
    assert bool((latest == latest[0]).all())
    assert int(latest.sum()) > 0
