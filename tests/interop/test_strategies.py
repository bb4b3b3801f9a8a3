"""Avalanche's strategies as methods: `tox -e avalanche`. What is said without Avalanche is tested everywhere."""

import copy
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clbench import api
from clbench.errors import InputError, RunFailed
from clbench.interop.avalanche import to_avalanche
from clbench.interop.strategies import STRATEGIES, StrategyLearner, global_seeds
from clbench.learner.learner import Interrupted, Learner
from clbench.learner.resolve import Resolved, resolve
from clbench.learner.run import make_learner, weights_digest
from clbench.learner.spec import RunSpec
from clbench.methods import registry
from clbench.rng import derive_seed
from clbench.store import RunRecord

needs_avalanche = pytest.mark.skipif(
    importlib.util.find_spec("avalanche") is None, reason="wants the extra `avalanche`"
)
QUICK = ["Replay", "LwF", "GDumb", "DER", "GEM", "Cumulative"]  # one of each kind: memory, regulariser, own loop ...


def spec(name: str, setting: str = "class", **changes: Any) -> RunSpec:
    options = {
        "scenario": "split-digits", "scenario_params": {"per_class": 16, "setting": setting}, "epochs": 2,
        "eval_every": 1, "eval_per_group": 10, "device": "cpu",
    }  # fmt: skip
    return RunSpec(method=f"avalanche:{name}", **{**options, **changes})


def prepared(wanted: RunSpec, **learner: Any) -> StrategyLearner:
    made = make_learner(resolve(wanted), **learner)
    assert isinstance(made, StrategyLearner)
    return made


def finished(learner: Learner) -> Learner:
    with torch.random.fork_rng([]):
        learner.run()
    return learner


def reread(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint file gives it back: no pickled objects."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


# -- without Avalanche ------------------------------------------------------------------------------------------------
def test_without_avalanche_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "avalanche", None)
    with pytest.raises(InputError, match=r"pip install 'clbench\[avalanche\]'"):
        registry.find("avalanche:Replay")


def test_unknown_strategies_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown strategy of Avalanche 'Replays'; did you mean 'Replay'"):
        registry.find("avalanche:Replays")
    with pytest.raises(InputError, match="unknown method 'snowfall:Replay'"):
        registry.find("snowfall:Replay")


# -- hyperparameters --------------------------------------------------------------------------------------------------
@needs_avalanche
def test_names_are_read_as_users_spell_them() -> None:
    for name in ("avalanche:AGEM", "avalanche:a-gem", "Avalanche:agem"):
        assert registry.find(name).id == "avalanche:AGEM"


@needs_avalanche
def test_hyperparameters_reach_the_constructor() -> None:
    found = resolve(spec("EWC", set={"ewc_lambda": "0.4", "mode": "online", "decay_factor": "0.5", "lr": "0.02"}))
    strategy = found.method._strategy
    plugin = next(p for p in strategy.plugins if type(p).__name__ == "EWCPlugin")
    assert (plugin.ewc_lambda, plugin.mode, plugin.decay_factor) == (0.4, "online", 0.5)
    assert strategy.optimizer.param_groups[0]["lr"] == 0.02
    assert (strategy.train_mb_size, strategy.train_epochs) == (found.stream.batch_size, 2)
    values = found.document["hyperparameters"]
    assert values["ewc_lambda"] == {"value": 0.4, "source": "--set"}
    assert values["keep_importance_data"]["source"].startswith("default: Avalanche 0.")
    assert values["version"]["value"] == importlib.metadata.version("avalanche-lib")


@needs_avalanche
@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("Replay", {"mem_sise": "5"}, "method avalanche:Replay 'mem_sise'; did you mean 'mem_size'"),
        ("Replay", {"mem_size": "many"}, "hyperparameter 'mem_size' of method avalanche:Replay"),
        ("Replay", {"mem_size": "0"}, "it must be at least 1"),
        ("EWC", {"mode": "both"}, "unknown value .*'both'"),
        ("EWC", {"mode": "online"}, "avalanche:EWC refuses .*mode=online"),
        ("Naive", {"version": "0.1"}, "unknown value"),
    ],
)  # fmt: skip
def test_wrong_hyperparameters_are_told(name: str, given: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(spec(name, set=given))


@needs_avalanche
def test_updates_per_batch_are_refused() -> None:
    with pytest.raises(InputError, match="updates once per batch"):
        resolve(spec("Naive", updates_per_batch=2))


# -- training ---------------------------------------------------------------------------------------------------------
@needs_avalanche
@pytest.mark.parametrize("setting", ["class", "task"])
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "MER"])
def test_every_strategy_runs_and_learns(name: str, setting: str) -> None:
    if setting not in STRATEGIES[name].settings:
        with pytest.raises(InputError, match="works in the class and domain-incremental setting"):
            resolve(spec(name, setting))
        return
    params = {"per_class": 60, "setting": setting}
    weak = {"lambda_reg": 0.01} if name == "MAS" else {}  # with its default, 1, later classes are hardly learned
    learner = finished(prepared(spec(name, scenario_params=params, epochs=3, eval_every=30, set=weak)))
    after = {task: hits for task, hits in learner.matrix if task >= 0}
    assert list(after) == list(range(5))
    own = [after[task][task].item() / len(group.rows) for task, group in enumerate(learner.scenario.groups)]
    assert sum(own) / 5 > 0.6, "a task is not known even right behind its end"
    assert learner.at.step == len(learner.losses.table()[0])
    if name in ("Replay", "DER", "ER_ACE", "GDumb", "MIR"):
        assert 0 < learner.memory[-1]["exemplars"] <= 200 * 64


@needs_avalanche
@pytest.mark.gpu
@pytest.mark.parametrize("evaluator", ["plain", "graph"])
def test_a_strategy_runs_on_the_device(evaluator: str) -> None:
    """Its samples come from the host, where the random views' generator is."""
    wanted = spec("Replay", device="cuda", train_view="pad_crop(1) flip", evaluator=evaluator)
    learner = finished(prepared(wanted))
    assert int(learner.matrix[-1][1].sum()) > 0
    assert next(learner.method.network.parameters()).device.type == "cuda"


@needs_avalanche
@pytest.mark.slow
def test_mer_runs() -> None:
    assert finished(prepared(spec("MER", eval_every=5))).at.step > 0


@needs_avalanche
@pytest.mark.parametrize("name", QUICK)
def test_evaluation_disturbs_nothing(name: str) -> None:
    digests = {weights_digest(finished(prepared(spec(name, eval_every=every))).method) for every in (0, 1)}
    assert len(digests) == 1


@needs_avalanche
@pytest.mark.parametrize("name", ["Replay", "EWC"])
def test_it_is_avalanches_own_training(name: str) -> None:
    """A script that uses Avalanche alone, on the same network and seeds, ends with the same weights."""
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    found = resolve(spec(name, set={"lr": "0.05"}))
    model = copy.deepcopy(found.method.network)
    arguments = {"mem_size": 200} if name == "Replay" else {"ewc_lambda": 1.0}
    strategy = getattr(supervised, name)(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), criterion=nn.CrossEntropyLoss(),
        train_mb_size=found.stream.batch_size, train_epochs=2, evaluator=EvaluationPlugin(), **arguments,
    )  # fmt: skip
    benchmark = to_avalanche(found.scenario, found.store, rows_in_minibatch=False)
    with torch.random.fork_rng([]):
        for index, experience in enumerate(benchmark.train_stream):
            with global_seeds(derive_seed(0, "avalanche", index)):
                strategy.train(experience)
    learner = finished(prepared(spec(name, set={"lr": "0.05"})))
    ours, theirs = learner.method.network.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@needs_avalanche
def test_an_online_stream_is_trained_in_listed_order() -> None:
    wanted = spec("Naive", scenario="si-blurry-digits", scenario_params={}, epochs=None, updates_per_batch=1)
    learner = prepared(wanted)
    seen: list[torch.Tensor] = []
    inner = learner.behind_iteration

    def spy(strategy: Any, *seconds: float) -> None:
        seen.append(strategy.mb_y.clone())
        inner(strategy, *seconds)

    learner.behind_iteration = spy  # type: ignore[method-assign]
    finished(learner)
    listed = torch.cat([task.targets for task in learner.scenario.tasks])
    assert torch.equal(torch.cat(seen), listed)
    positions = [point[3] for point in learner.evaluator.points]
    assert positions == sorted(positions)
    assert positions[-1] == len(listed)


# -- stopping and going on --------------------------------------------------------------------------------------------
def stopped_at(wanted: RunSpec, step: int) -> list[dict[str, Any]]:
    """The checkpoints of a run that was asked to stop behind `step`."""
    states: list[dict[str, Any]] = []
    learner = prepared(wanted, save=states.append, stop=lambda: learner.at.step >= step)
    with pytest.raises(Interrupted):
        finished(learner)
    return states


@needs_avalanche
@pytest.mark.parametrize("name", QUICK)
def test_an_interrupted_run_ends_as_if_it_had_not_been(name: str) -> None:
    wanted = spec(name, checkpoint_every=1)
    whole = finished(prepared(wanted))
    states = stopped_at(wanted, whole.task_starts[3] + 1)
    assert [state["cursor"][:3] for state in states] == [[1, 0, 0], [2, 0, 0], [3, 0, 0]]  # task ends only
    resumed = prepared(wanted)
    resumed.load_state_dict(reread(states[-1]))
    assert "trained again" in resumed.notes[0]
    finished(resumed)
    assert weights_digest(whole.method) == weights_digest(resumed.method)
    a, b = whole.evaluator.drain(), resumed.evaluator.drain()
    assert a["points"] == b["points"]
    assert torch.equal(a["hits"], b["hits"])
    assert all(x.tolist() == y.tolist() for x, y in zip(whole.losses.table(), resumed.losses.table(), strict=True))
    assert [hits.tolist() for _, hits in whole.matrix] == [hits.tolist() for _, hits in resumed.matrix]
    assert resumed.times["retrain_s"] > 0


@needs_avalanche
def test_a_resume_that_comes_to_other_weights_fails() -> None:
    state = stopped_at(spec("Naive"), 15)[-1]
    learner = prepared(spec("Naive", seed=1))  # another run's initial weights
    learner.load_state_dict(state)
    with pytest.raises(RunFailed, match="start anew with --fresh"):
        finished(learner)


# -- the record -------------------------------------------------------------------------------------------------------
@needs_avalanche
def test_the_record_is_like_any_other(tmp_path: Path) -> None:
    options = spec("Replay").model_dump(exclude={"method", "scenario", "seed", "out"}, exclude_defaults=True)
    result = api.run("avalanche:replay", "split-digits", out=tmp_path, **options)[0]
    record = RunRecord(result.path)
    assert record.is_done()
    assert record.damage() == []
    assert record.read_spec().method == "avalanche:Replay"
    assert result.summary["min_accuracy"] is not None
    assert result.summary["steps"] == record.read_curve().steps[-1]
    assert api.run("avalanche:Replay", "split-digits", out=tmp_path, **options)[0].status == "found"


@needs_avalanche
def test_a_killed_run_is_resumed_from_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = spec("Replay").model_dump(exclude={"method", "scenario", "seed", "out"}, exclude_defaults=True)
    whole = api.run("avalanche:Replay", "split-digits", out=tmp_path / "whole", **options)[0]
    real: Callable[..., Any] = StrategyLearner._finish_task

    def killed(self: StrategyLearner) -> None:
        if self.at.task == 2:
            raise SystemExit
        real(self)

    monkeypatch.setattr(StrategyLearner, "_finish_task", killed)
    with pytest.raises(SystemExit):
        api.run("avalanche:Replay", "split-digits", out=tmp_path / "cut", **options)
    monkeypatch.undo()
    again = api.run("avalanche:Replay", "split-digits", out=tmp_path / "cut", **options)[0]
    assert again.summary["weights_sha256"] == whole.summary["weights_sha256"]
    notes = RunRecord(again.path).read_env()[-1].notes
    assert any("trained again" in note for note in notes)
    assert again.summary["times"]["retrain_s"] > 0


@needs_avalanche
def test_a_dry_run_estimates_it() -> None:
    dry = api.dry_run("avalanche:LwF", "split-digits", device="cpu")
    assert isinstance(dry.resolved, Resolved)
    assert dry.estimate.num_steps > 0
    assert dry.estimate.train_s > 0
