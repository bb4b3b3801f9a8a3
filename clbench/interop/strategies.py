"""Avalanche's strategies as methods: `clbench run --method avalanche:Replay`.

A strategy is trained by its own loop (`strategy.train`, one call per task) and evaluated by our evaluator, which a
plugin calls behind every iteration. Network, optimiser, batch size, epochs, views, data and class order are the run's,
so its record stands beside those of other methods.

What is different from a method of our own:
- A strategy gets a task whole, also in an online stream (there in listed order, once). Replay memories are then filled
  at task ends, as Avalanche's strategies do.
- A strategy's state cannot be put into a state dict. A checkpoint is made at task ends only, and holds our books and
  the sha256 of the weights. A resumed run trains the finished tasks again without evaluating them, and goes on only if
  it comes to the same weights; `env.json` notes it.
- Draws come from the global generators of torch, Python and numpy, seeded anew from the run's seed before each task.
- In the task setting the network has one head of static size, and a sample's logits outside its own task are -1000.

Avalanche itself (avalanche-lib 0.6) is imported only when a strategy is asked for.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import make_dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clbench.errors import InputError, RunFailed, unknown_name
from clbench.interop.avalanche import require_avalanche, to_avalanche
from clbench.learner.learner import Interrupted, Learner
from clbench.learner.run import weights_digest
from clbench.methods._softmax import OptimizerConfig, make_optimizer, siblings, width_of
from clbench.methods.base import Method, Setting, hp
from clbench.methods.registry import FoundMethod
from clbench.rng import derive_seed
from clbench.scenarios.model import SettingName, Task
from clbench.stream import Plan
from clbench.stream.types import Phase

__all__ = ["STRATEGIES", "StrategyLearner", "StrategyMethod", "find"]

HIDDEN_LOGIT = -1000.0  # of a class that is not of the sample's task: Avalanche's own value for unused units
ALL: frozenset[SettingName] = frozenset({"class", "task", "domain"})
UNLABELLED: frozenset[SettingName] = frozenset({"class", "domain"})  # calls the model without task labels somewhere
CARD = "stability_gap card, section 2"


class Known(NamedTuple):
    """What a strategy's signature does not say.

    settings: where it works.  rows: what one call of `train` runs over: the task, all tasks so far, or its memory.
    defaults: argument -> (value, source), for arguments that have none in Avalanche.
    given: arguments that follow from the scenario.
    """

    settings: frozenset[SettingName] = ALL
    rows: Literal["task", "seen", "memory"] = "task"
    defaults: Mapping[str, tuple[Any, str]] = {}
    given: Callable[[Setting], Mapping[str, Any]] = lambda setting: {}


STRATEGIES: Mapping[str, Known] = {
    "AGEM": Known(defaults={"patterns_per_exp": (400, f"{CARD} (GEM)")}),
    "Cumulative": Known(rows="seen"),
    "DER": Known(UNLABELLED),
    "ER_ACE": Known(UNLABELLED),
    "EWC": Known(defaults={"ewc_lambda": (1.0, CARD)}),
    "FromScratchTraining": Known(),
    "GDumb": Known(rows="memory"),
    "GEM": Known(defaults={"patterns_per_exp": (400, CARD)}),
    "GSS_greedy": Known(UNLABELLED, given=lambda setting: {"input_size": list(setting.image_shape)}),
    "LwF": Known(defaults={"alpha": (1.0, CARD), "temperature": (2.0, CARD)}),
    "MAS": Known(),
    "MER": Known(),
    "MIR": Known(defaults={"mem_size": (200, "Avalanche's Replay"), "subsample": (50, "clbench")}),
    "Naive": Known(),
    "Replay": Known(),
    "SynapticIntelligence": Known(defaults={"si_lambda": (1.0, "clbench")}),
}
OURS = {  # what the run decides, not a hyperparameter of the strategy
    "self", "model", "optimizer", "criterion", "train_mb_size", "train_epochs", "eval_mb_size", "device", "plugins",
    "evaluator", "eval_every", "peval_mode", "verbose", "base_kwargs", "kwargs",
}  # fmt: skip
CHOICES = {("EWC", "mode"): ("separate", "online")}


# -- from a name to a method -------------------------------------------------------------------------------------------
def find(name: str) -> FoundMethod:
    """The method `avalanche:<name>`. Raises InputError if there is no such strategy, or no Avalanche."""
    wanted = name.lower().replace("-", "").replace("_", "")
    known = next((each for each in STRATEGIES if each.lower().replace("_", "") == wanted), None)
    if known is None:
        raise unknown_name("strategy of Avalanche", name, STRATEGIES, "(those that map onto a run are known)")
    require_avalanche()
    from avalanche.training import supervised

    strategy = getattr(supervised, known)
    about = STRATEGIES[known]
    members = {
        "__doc__": f"Avalanche's {known}.",
        "Config": config_of(known, strategy),
        "settings": about.settings,
        "strategy_name": known,
    }
    return FoundMethod(f"avalanche:{known}", type(f"Avalanche{known}", (StrategyMethod,), members))


def config_of(name: str, strategy: type) -> type:
    """A Config whose fields are the optimiser's and the arguments of the strategy's constructor.

    Raises InputError if the installed version has an argument without a default that is not known here.
    """
    import importlib.metadata

    version = importlib.metadata.version("avalanche-lib")
    about = STRATEGIES[name]
    fields: list[tuple[str, Any, Any]] = []
    for argument, parameter in inspect.signature(strategy.__init__).parameters.items():  # type: ignore[misc]
        if argument in OURS or argument == "input_size":
            continue
        default, source = parameter.default, f"Avalanche {version}"
        if default is inspect.Parameter.empty:
            if argument not in about.defaults:
                raise InputError(f"{name} of avalanche-lib {version} wants {argument!r}, which clbench does not know")
            default, source = about.defaults[argument]
        kind = type_of(parameter.annotation, default)
        fields.append((argument, kind, hp(
            default, f"argument of Avalanche's {name}", low=1 if kind in (int, int | None) else 0,
            high=None, choices=CHOICES.get((name, argument)), source=source,
        )))  # fmt: skip
    # what the installed version does decides the result, so it is part of the specification
    fields.append(
        ("version", str, hp(version, "of avalanche-lib, as installed", choices=(version,), source="installed"))
    )
    made = make_dataclass(f"{name}Config", fields, bases=(OptimizerConfig,), frozen=True)
    made.__doc__ = f"Hyperparameters of Avalanche's {name}: its constructor's arguments, and the optimiser's."
    return made


def type_of(annotation: Any, default: Any) -> Any:
    """A type that can be read from text, of an argument's annotation (`Union[float, Sequence[float]]`: one float)."""
    named = str(annotation)
    for kind in (bool, int, float, str):
        if annotation is kind:
            return kind
        if kind.__name__ in named and ("Optional" in named or "None" in named):
            return kind | None
    return float if "float" in named else type(default)


# -- the method --------------------------------------------------------------------------------------------------------
class Network(nn.Module):
    """Backbone and linear head in one, as a strategy wants its model: images (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(width_of(backbone), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.backbone(images))
        return out


def task_network(network: Network, together: Tensor, first_class: Sequence[int]) -> nn.Module:
    """`network` as Avalanche's multi-task module: answers of a task from its own classes only.

    together: (C, C) bool, classes that one softmax runs over. first_class: of each task.
    """
    from avalanche.models.dynamic_modules import MultiTaskModule

    class TaskNetwork(MultiTaskModule):  # type: ignore[misc]  # Avalanche is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("own", together[list(first_class)], persistent=False)
            self.max_class_label = together.shape[0]  # static from the start

        def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
            out: Tensor = self.network(x).masked_fill(~self.own[task_label], HIDDEN_LOGIT)
            return out

    return TaskNetwork()


class StrategyMethod(Method):
    """One strategy; `find` makes a class for each. `learner` drives it, not the usual loop.

    Raises InputError for values that the strategy's constructor refuses.
    """

    strategy_name = ""
    learner: ClassVar[Any] = None  # StrategyLearner, set below

    def __init__(self, config: Any, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        if setting.updates_per_batch != 1:
            raise InputError(f"avalanche:{self.strategy_name} updates once per batch; give --updates-per-batch 1")
        plain = Network(backbone, setting.num_classes)
        network: nn.Module = plain
        del self.backbone  # it is inside the network, which some strategies replace
        if setting.setting == "task":
            together = siblings(setting)
            if together is None:
                together = torch.ones((setting.num_classes, setting.num_classes), dtype=torch.bool)
            network = task_network(plain, together, [int(classes[0]) for classes in setting.task_classes])
        self.network = network.to(setting.device)
        self._strategy = self._make(config)

    def _make(self, config: Any) -> Any:
        from avalanche.training import supervised
        from avalanche.training.plugins import EvaluationPlugin

        about, setting = STRATEGIES[self.strategy_name], self.setting
        taken = {*OptimizerConfig.__dataclass_fields__, "version"}
        arguments = {key: getattr(config, key) for key in type(config).__dataclass_fields__ if key not in taken}
        optimizer = make_optimizer(config, list(self.network.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it has no loggers
            silent = EvaluationPlugin()
        try:
            return getattr(supervised, self.strategy_name)(
                model=self.network, optimizer=optimizer, criterion=nn.CrossEntropyLoss(),
                train_mb_size=setting.batch_size, train_epochs=setting.epochs, eval_mb_size=setting.batch_size,
                device=setting.device, plugins=[], evaluator=silent, eval_every=-1,
                **arguments, **about.given(setting),
            )  # fmt: skip
        except (AssertionError, ValueError) as error:
            given = ", ".join(f"{key}={value}" for key, value in arguments.items())
            reason = str(error) or type(error).__name__
            raise InputError(f"avalanche:{self.strategy_name} refuses {given} ({reason}); change it by --set") from None

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        """One call of the strategy's `train`. How many iterations that takes is the strategy's; this is the number
        without any that only replay."""
        about = STRATEGIES[self.strategy_name]
        if about.rows == "task":
            return [Phase("train")]
        return [Phase("train", source="seen", first=self.config.mem_size if about.rows == "memory" else None)]

    def logits(self, images: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        if self.setting.setting == "task":
            assert task is not None
            out: Tensor = self.network.forward_single_task(images, task)  # type: ignore[operator]  # see task_network
            return out
        answers: Tensor = self.network(images)
        return answers

    def memory_bytes(self) -> dict[str, int]:
        """Of what the strategy and its plugins keep: exemplars, counted as the images they stand for, and tensors."""
        model = self._strategy.model
        own = {id(part) for part in (model, *model.parameters(), *model.buffers())}
        exemplars, tensors = kept([*self._strategy.plugins, vars(self._strategy)], own)
        sizes = {"exemplars": exemplars * self.setting.image_bytes, "tensors": tensors}
        return {name: size for name, size in sizes.items() if size}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must come to again, see `StrategyLearner`."""
        return {"weights_sha256": weights_digest(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError("a strategy of Avalanche cannot take over a state: StrategyLearner trains it again")


def kept(root: Any, seen: set[int]) -> tuple[int, int]:
    """(exemplars, bytes of tensors) reachable from `root`: tensors, networks, and Avalanche's data sets and buffers."""
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.training.storage_policy import ExemplarsBuffer

    if id(root) in seen:
        return 0, 0
    seen.add(id(root))
    if isinstance(root, ExemplarsBuffer):
        return kept(root.buffer, seen)
    if isinstance(root, AvalancheDataset):
        return len(root), 0
    if isinstance(root, Tensor):
        return 0, root.numel() * root.element_size()
    if isinstance(root, nn.Module):
        parts: list[Any] = [*root.parameters(), *root.buffers()]
    elif isinstance(root, Mapping):
        hidden = ("model", "optimizer", "experience", "evaluator", "clock", "plugins", "loss")  # of a strategy itself
        parts = [value for key, value in root.items() if key not in hidden]
    elif isinstance(root, list | tuple | set):
        parts = list(root)
    elif type(root).__module__.startswith("avalanche.") and hasattr(root, "__dict__"):
        parts = [vars(root)]
    else:
        return 0, 0
    counts = [kept(part, seen) for part in parts]
    return sum(count[0] for count in counts), sum(count[1] for count in counts)


# -- the loop ----------------------------------------------------------------------------------------------------------
class StrategyLearner(Learner):
    """Drives a strategy through a scenario: `strategy.train` once per task, with a plugin that keeps our books and
    evaluates behind every iteration. Gives way behind each task.

    Raises RunFailed (NaN loss; a resumed run that does not come to the weights it had) or Interrupted.
    """

    method: StrategyMethod
    retrain = 0  # tasks that were finished before this start
    expected = ""  # sha256 of the weights behind them

    def steps(self) -> Iterator[None]:
        if self._progress is not None:
            self._progress.begin(self.at.step, self.total_steps())
        reader, strategy = self.stream.read, self.method._strategy
        benchmark = to_avalanche(
            self.scenario, reader.store, train_view=reader.views["train"].text, test_view=reader.views["test"].text,
            rows_in_minibatch=False,
        )  # fmt: skip
        strategy.plugins.append(watching_plugin(self))  # the last, so that it sees what an iteration ended with
        for index, experience in enumerate(benchmark.train_stream):
            if index < self.retrain:
                self._retrain(index, experience)
            else:
                self._train(index, experience)
            yield
        self.losses.drain()

    def behind_iteration(self, strategy: Any, data_s: float, train_s: float) -> None:
        """The books of one iteration of the strategy's loop."""
        self.method.network = strategy.model  # GDumb and FromScratchTraining put in another one
        if self.at.task < self.retrain or not self._inside:
            self._give_way()
            return
        at, plan, begin = self.at, self._plan, time.perf_counter()
        step = at.step + 1
        self.losses.add(step, {"loss": strategy.loss.detach().reshape(()).clone()})
        self.images_trained += len(strategy.mb_y)  # replayed ones too
        position = self.stream.position(plan, at.iteration)
        self.at = at._replace(iteration=at.iteration + 1, step=step)
        by_samples = self.schedule.due_by_samples(position, self.sampled)
        if by_samples or self.schedule.due(step - self.task_starts[at.task]):
            self.sampled += by_samples
            self.evaluator.observe(self.method, at.task, 0, step, position)
        self.times["data_s"] += data_s
        self.times["train_s"] += train_s
        self.times["evaluate_s"] += time.perf_counter() - begin
        self._housekeeping(plan)

    def _train(self, index: int, experience: Any) -> None:
        self._plan: Plan = self.plans()[index][0]
        self.at = self.at._replace(task=index, phase=0, iteration=0, update=0)
        self.task_starts.append(self.at.step)
        if self.at.step == 0:
            self._observe_start(self._plan)
        self._inside = True
        self._call(index, experience)
        self._inside = False
        self.at = self.at._replace(phase=1)
        self._finish_task()
        self.at = self.at._replace(task=index + 1, phase=0, iteration=0)
        self.checkpoint()

    def _retrain(self, index: int, experience: Any) -> None:
        begin = time.perf_counter()
        self._call(index, experience)
        self.times["retrain_s"] = self.times.get("retrain_s", 0.0) + time.perf_counter() - begin
        if index == self.retrain - 1 and weights_digest(self.method) != self.expected:
            raise RunFailed(
                f"{self.method.strategy_name} was trained again up to task {index} and came to other weights than the "
                f"interrupted run, so it cannot go on from there; start anew with --fresh"
            )

    def _call(self, index: int, experience: Any) -> None:
        """The strategy's own loop over one task; an empty one is nothing to train on."""
        if not len(experience.dataset):
            return
        seed = derive_seed(self.stream.seed, "avalanche", index)
        with global_seeds(seed), self._autocast(), without_deprecations():
            self.method._strategy.train(
                experience, eval_streams=[], shuffle=not self.scenario.online, pin_memory=False,
                drop_last=self.scenario.defaults.drop_last,
            )  # fmt: skip
        self.method.network = self.method._strategy.model

    def _give_way(self) -> None:
        if self._stop():
            raise Interrupted

    def checkpoint(self) -> None:
        """At task ends only: inside a task there is nothing to go on from."""
        if self._inside:
            self._saved_at = (self.at.step, time.monotonic())
        else:
            super().checkpoint()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._restored = None
        self.retrain, self.expected = self.at.task, state["method"]["weights_sha256"]
        self.notes.append(
            f"a strategy of Avalanche has no state to load: tasks 0 to {self.retrain - 1} are trained again without "
            f"evaluation, and the weights must come out the same"
        )


StrategyMethod.learner = StrategyLearner


def watching_plugin(learner: StrategyLearner) -> Any:
    """A plugin that tells `learner` of every iteration, with the seconds that went into data and into training."""
    from avalanche.core import SupervisedPlugin

    class Watch(SupervisedPlugin):  # type: ignore[misc]  # Avalanche is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.ended = self.got = time.perf_counter()

        def before_training(self, strategy: Any, **_: Any) -> None:
            self.ended = time.perf_counter()

        def before_training_iteration(self, strategy: Any, **_: Any) -> None:
            self.got = time.perf_counter()

        def after_training_iteration(self, strategy: Any, **_: Any) -> None:
            learner.behind_iteration(strategy, self.got - self.ended, time.perf_counter() - self.got)
            self.ended = time.perf_counter()

    return Watch()


@contextlib.contextmanager
def global_seeds(seed: int) -> Iterator[None]:
    """Seed the global generators that Avalanche draws from; Python's and numpy's are put back behind it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # Avalanche uses numpy's global generator
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def without_deprecations() -> Iterator[None]:
    """Keep back Avalanche's warnings about its own use of what it deprecates: one per task and more, which it shows
    whatever the filters say."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def others(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, DeprecationWarning):
                show(message, category, *where, **more)

        warnings.showwarning = others
        yield
