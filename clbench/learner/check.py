"""Conformance of a method: what `clbench check FILE` runs, and what the test suite runs over every built-in one.

Each check runs the method for real, on a few scikit-learn digits.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from clbench.errors import ClbenchError
from clbench.evaluator.evaluator import watching
from clbench.learner.hostreads import HostRead, forbid_host_reads
from clbench.learner.learner import Learner
from clbench.learner.resolve import resolve
from clbench.learner.run import attach_features, make_learner, weights_digest
from clbench.learner.spec import RunSpec
from clbench.methods import registry
from clbench.methods.base import Method, config_fields
from clbench.methods.config import make_config

__all__ = ["Check", "check_method"]

KNOWN_SETTINGS = {"class", "task", "domain"}
MASKS = {"seen", "all", "task"}
# options and views of the small backbones, since no accuracy is asked for
NARROW: dict[str, dict[str, Any]] = {
    "reduced-resnet18": {"nf": 4},
    "clip-small": {"pretrained": False},
    "vit-tiny-32": {"width": 16, "heads": 2, "depth": 5},
}
VIEWS = {"clip-small": "rgb"}


class Check(NamedTuple):
    """One line of the report."""

    name: str
    ok: bool
    message: str


def check_method(name: str, hyperparameters: Mapping[str, Any] | None = None) -> list[Check]:
    """Run all checks on a method (id or path). Raises InputError if it can't be found or imported; whatever goes wrong
    behind that is a failed check with its reason."""
    found = registry.find(name)
    view = VIEWS.get(found.cls.small_backbone, "")
    spec = RunSpec(
        method=name,
        scenario="split-digits",
        scenario_params={"per_class": 24, **({} if "class" in found.cls.settings else {"setting": "task"})},
        set={**found.cls.quick, **(hyperparameters or {})},
        epochs=2,
        eval_every=3,
        eval_per_group=20,
        device="cpu",
        train_view=view,
        test_view=view,
        # its reference set is of digits, too: no other data are on every machine
        allow_contamination=has_reference(found.cls, hyperparameters or {}),
        backbone=None if found.cls.frozen_backbone is True else found.cls.small_backbone,
        backbone_options=NARROW.get(found.cls.small_backbone, {}),
    )
    checks: list[tuple[str, Callable[[RunSpec], str]]] = [
        ("declares its hyperparameters and settings", declared),
        ("gives finite (B, C) logits", finite_logits),
        ("reads nothing on the host in a step or an evaluation", no_host_reads),
        ("gives the same result for the same seed", repeatable),
        ("is not disturbed by being evaluated", undisturbed),
        ("resumes to the bit from any step", resumable),
        ("reports the memory it keeps", memory),
    ]
    return [judge(title, check, spec) for title, check in checks]


def judge(title: str, check: Callable[[RunSpec], str], spec: RunSpec) -> Check:
    """Run one check; AssertionError is its own sentence, anything else is named with its type."""
    try:
        return Check(title, True, check(spec))
    except (AssertionError, ClbenchError) as error:
        return Check(title, False, str(error))
    except Exception as error:  # the method under test may raise anything
        return Check(title, False, f"{type(error).__name__}: {error}")


def declared(spec: RunSpec) -> str:
    cls = registry.find(spec.method).cls
    fields = config_fields(cls.Config)
    undeclared = [name for name, item in fields.items() if not item.metadata.get("help")]
    assert not undeclared, f"declare {', '.join(undeclared)} of Config with hp(default, help)"
    assert cls.settings, "settings is empty"
    assert cls.settings <= KNOWN_SETTINGS, f"settings must be among {sorted(KNOWN_SETTINGS)}"
    assert cls.mask in MASKS, f"mask is {cls.mask!r}, it must be one of {sorted(MASKS)}"
    return f"{len(fields)} hyperparameters"


def finite_logits(spec: RunSpec) -> str:
    learner = finished(spec)
    scenario, method = learner.scenario, learner.method
    allowed = torch.ones(scenario.num_classes, dtype=torch.bool)
    with watching(method):
        images = learner.stream.read(scenario.groups[0].rows[:7], None, method.view)
        logits = method.logits(images, allowed, 0 if scenario.setting == "task" else None)
    shape = (7, scenario.num_classes)
    assert tuple(logits.shape) == shape, f"logits of 7 images have shape {tuple(logits.shape)}, expected {shape}"
    assert bool(torch.isfinite(logits).all()), "logits hold NaN or infinity; mask in the loss, not in the answer"
    return f"shape {shape}"


def no_host_reads(spec: RunSpec) -> str:
    learner = prepared(spec)
    learner.guard = forbid_host_reads
    try:
        learner.run()
    except HostRead as error:
        raise AssertionError(f"{error} (step {learner.at.step}, task {learner.at.task})") from None
    return f"{learner.at.step} steps"


def has_reference(cls: type[Method], hyperparameters: Mapping[str, Any]) -> bool:
    """Whether the method reads data besides the scenario's."""
    config, _ = make_config(cls.Config, {"check": {**cls.quick, **hyperparameters}}, "the method")
    return cls.reference(config) is not None


def repeatable(spec: RunSpec) -> str:
    first, second = finished(spec), finished(spec)
    same(first, second, "two runs with one seed differ: draw from setting.rng(purpose, step)")
    return weights(first)[:12]


def undisturbed(spec: RunSpec) -> str:
    off, on = (finished(spec.model_copy(update={"eval_every": every})) for every in (0, 1))
    assert weights(off) == weights(on), (
        "weights differ with evaluation off and at every step: logits or features change state"
    )
    assert on.evaluator.images_as_read(), "logits or features write into the images that they are given"
    if registry.find(spec.method).cls.learner is not None:
        return "off = every step"
    beside = finished(spec.model_copy(update={"eval_every": 1, "evaluator": "snapshot"}))
    same(on, beside, "evaluating a copy of the method ends differently: answers depend on what a copy does not follow")
    return "off = every step = from a snapshot"


def resumable(spec: RunSpec) -> str:
    whole = finished(spec)
    states: list[tuple[int, bytes]] = []

    def save(state: dict[str, Any]) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        states.append((state["cursor"][-1], file.getvalue()))

    finished(spec.model_copy(update={"checkpoint_every": 1}), save)
    picked = states[:: max(len(states) // 8, 1)]
    for step, saved in picked:
        learner = prepared(spec)
        learner.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        learner.run()
        same(whole, learner, f"a run resumed at step {step} ends differently: state_dict leaves something out")
    return f"at {len(picked)} of {len(states)} steps"


def memory(spec: RunSpec) -> str:
    kept = finished(spec).method.memory_bytes()
    wrong = {name: value for name, value in kept.items() if not isinstance(value, int) or value < 0}
    assert not wrong, f"memory_bytes must give whole numbers of bytes, got {wrong}"
    return ", ".join(f"{name} {value:,} B" for name, value in kept.items()) or "nothing but the network"


# -- runs ------------------------------------------------------------------------------------------------------------
def prepared(spec: RunSpec, save: Callable[[dict[str, Any]], None] = lambda state: None) -> Learner:
    """A learner that hasn't started."""
    resolved = resolve(spec)
    if resolved.method.view == "features":
        attach_features(resolved, None)
    return make_learner(resolved, save=save)


def finished(spec: RunSpec, save: Callable[[dict[str, Any]], None] = lambda state: None) -> Learner:
    """A learner behind its last task."""
    learner = prepared(spec, save)
    with torch.random.fork_rng([]):
        learner.run()
    return learner


def weights(learner: Learner) -> str:
    return weights_digest(learner.method)


def same(a: Learner, b: Learner, otherwise: str) -> None:
    assert weights(a) == weights(b), f"{otherwise} (weights)"
    left, right = a.evaluator.drain(), b.evaluator.drain()
    assert left["points"] == right["points"], f"{otherwise} (evaluated steps)"
    assert torch.equal(left["hits"], right["hits"]), f"{otherwise} (curve)"
    for (_, one), (_, other) in zip(a.matrix, b.matrix, strict=True):
        assert torch.equal(one, other), f"{otherwise} (accuracy matrix)"
