"""What a method is, and what it may know of the world.

A method is one file in this folder (or any file given by path) with a class `METHOD` below `Method`. It owns no loop:
it asks for phases, and the learner runs, times, evaluates, shows and resumes every iteration of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clbench.data.classes import ClassTable
from clbench.scenarios.model import SettingName, Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["Head", "Method", "NoConfig", "Reference", "ReferenceSpec", "Setting", "freeze", "hp"]

FROZEN_FLAG = "_clbench_frozen"


def hp(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
    scale: Literal["linear", "log"] = "linear",
    unit: str = "",
    source: str = "",
    tune: Mapping[str, Any] | None = None,
) -> Any:
    """Declare a hyperparameter: a field of a method's frozen `Config` dataclass.

    low, high: closed range of valid values. choices: the valid values. scale: how a search draws between low and high.
    tune: a narrower range for searching, `{"low": ..., "high": ...}` or `{"choices": [...]}`; without it the
    hyperparameter is not searched. source: where the default comes from (paper, table, card).
    """
    return field(
        default=default,
        metadata={
            "help": help, "low": low, "high": high, "choices": None if choices is None else tuple(choices),
            "scale": scale, "unit": unit, "source": source, "tune": tune,
        },
    )  # fmt: skip


@dataclass(frozen=True)
class NoConfig:
    """For methods without hyperparameters."""


class Reader(Protocol):
    """Read images of the store: see `clbench.data.reader.Reader`."""

    def __call__(
        self, rows: Tensor, domain: Tensor | None = None, view: str = "train", rng: torch.Generator | None = None
    ) -> Tensor: ...


class ReferenceSpec(NamedTuple):
    """A reference set that a method asks for: data of its own, besides the scenario's, without labels.

    images: data sets or folders, read at the scenario's size through its test view.
    texts: `imagenet-names` (a photo of each of the 1,000 classes), a data set (its first prompt over its classes), or a
        file with a sentence per line; images and texts need not belong together.
    rows: which rows of the data sets. limit: at most so many images, drawn evenly from all of them; None for all.
    """

    images: tuple[str, ...]
    texts: tuple[str, ...]
    rows: Literal["all", "train", "test"] = "all"
    limit: int | None = None


@dataclass(frozen=True)
class Reference:
    """A reference set. read(rows): (B,) int64 in 0..num_images-1 on the device -> (B, C, H, W) float32, test view.
    texts: sentences. fingerprint: sha256 of images, rows, view and texts."""

    num_images: int
    texts: tuple[str, ...]
    read: Callable[[Tensor], Tensor]
    fingerprint: str


@dataclass(frozen=True)
class Setting:
    """What a method may know of the world.

    classes: table of the C classes of the scenario (static from the start; heads have C outputs).
    classes_per_task: number of new classes of each task, or None where boundaries are unknown.
    task_classes: the class ids of each task (for the `task` setting and for methods that know boundaries).
    image_shape: (C, H, W) that `read` returns under view `train`.  image_bytes: bytes of one stored image.
    scenario_id, online, epochs, batch_size: the scenario's.
    read(rows, domain, view, rng): (B,) int64 -> (B, C, H, W) float32; for replay, second views, reference sets.
    rng(purpose, *keys): a generator on `device` that depends on the run's seed and these arguments alone.
    reference: what `Method.reference` asked for, or None.
    stream_length: samples of the whole stream, one pass over each task.
    """

    classes: ClassTable
    classes_per_task: tuple[int, ...] | None
    task_classes: tuple[Tensor, ...]
    image_shape: tuple[int, ...]
    image_bytes: int
    device: torch.device
    scenario_id: str
    setting: SettingName
    online: bool
    epochs: int
    batch_size: int
    updates_per_batch: int
    prompts: Mapping[int, tuple[str, ...]]
    read: Reader
    rng: Callable[..., torch.Generator]
    reference: Reference | None = None
    stream_length: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class Head(NamedTuple):
    """A classifier over `features`, for evaluators that fuse it with the count.

    kind `linear`: F W^T + b; `cosine`: scale * F/(|F| + eps) . W/(|W| + eps) + b, 0 for a vector of zeros;
    `nearest`: 2 F W^T - |W|^2 + b on F as given; `text`: as `cosine`, W being the text features of the classes.
    W: (C, D), b: (C,). scale: a number, or a 0-d tensor where it is learned (the exponential of CLIP's).
    """

    kind: Literal["linear", "cosine", "nearest", "text"]
    weight: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 1.0
    eps: float = 1e-12


def freeze(module: nn.Module) -> nn.Module:
    """Fix `module` for the rest of the run: eval mode, no gradients, left out of checkpoints. Returns it."""
    module.eval().requires_grad_(False)
    setattr(module, FROZEN_FLAG, True)
    return module


class Method:
    """Base of all methods; override what differs. Everything is called by the learner in this order:

    `phases(task, index)` -> for each phase: `begin_phase`, `open_phase`, then `step` for every batch, with `end_epoch`
    behind each pass, then `end_phase`. After a resume: `open_phase`, `load_state_dict`, and on with `step`.

    Config: frozen dataclass whose fields are declared with `hp`.
    settings: scenario settings it supports; a run outside them is refused before it starts.
    mask: what predictions are taken over: `seen` classes, `all`, or those of the `task`.
    view: what the evaluator reads images through; `features` for cached features of a frozen backbone.
    frozen_backbone: True if the method never changes the backbone, so that its features may be cached.
    small_backbone: built-in backbone for images up to 28 px where the user names none (and for `clbench check`).
    graphable: True if `update` has static shapes and may be captured in a CUDA graph; a subclass must say so itself.
    learner: class that drives it instead of `clbench.learner.Learner`, for methods with a loop of their own
        (`clbench.interop.strategies`).
    """

    Config: ClassVar[type] = NoConfig
    settings: ClassVar[frozenset[str]] = frozenset({"class", "task", "domain"})
    mask: ClassVar[Literal["seen", "all", "task"]] = "seen"
    aliases: ClassVar[tuple[str, ...]] = ()
    small_backbone: ClassVar[str] = "mlp"
    graphable: ClassVar[bool] = False
    quick: ClassVar[Mapping[str, Any]] = {}  # hyperparameters for `clbench check`, where the defaults take minutes
    memory_advice: ClassVar[str] = "--batch-size or --eval-per-group"  # what to lower when memory runs out
    learner: ClassVar[Any] = None
    view: str = "test"
    frozen_backbone: bool = False

    def __init__(self, config: Any, backbone: nn.Module, setting: Setting) -> None:
        """`backbone` maps (B, C, H, W) to (B, D) features and has `num_features` = D."""
        self.config = config
        self.setting = setting
        self.backbone = backbone

    @classmethod
    def reference(cls, config: Any) -> ReferenceSpec | None:
        """The reference set that it reads under `config`, to be found in `setting.reference`; None for most methods."""
        return None

    def prepare(self, report: Callable[[int, int], None] | None = None) -> None:
        """Once ahead of the first step of a process: what is computed from the initial network and kept on disk, such
        as the features of a frozen teacher. `report(done, total)` shows progress."""

    # -- what to run ---------------------------------------------------------------------------------------------
    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        """The loops of task `index`: a pure function, asked again after a resume."""
        return [Phase("train")]

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        """Once, as a phase starts: reset, draw fresh weights. Not called on a resume inside the phase."""

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        """Create what the phase needs to run (optimiser, trainable flags). Called after `begin_phase`, and on a resume
        before `load_state_dict`; must not draw, and must not depend on what was learned."""

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        """One update. Returns named 0-d device tensors (losses). No host read: no `.item()`, `if tensor`, `.cpu()`.
        Override this, or its three parts where the step shall be captured in a CUDA graph (`graphable`)."""
        losses = self.update(self.draw(batch))
        self.keep(batch)
        return losses

    def draw(self, batch: Batch) -> Any:
        """First part of a step, always run: whatever depends on generators, cursor or plain numbers. Returns what
        `update` computes with: the batch, or a tuple of it and further tensors, None, or tuples of them."""
        return batch

    def update(self, inputs: Any) -> Mapping[str, Tensor]:
        """Second part: forward, backward, optimiser; a function of the tensors in `inputs` and of the method's tensors.
        Under `graphable` it runs as it was captured: it changes no plain attribute, and what it reads of plain numbers
        stays as it was then; what changes must come as a tensor. `inputs` have no cursor there."""
        raise NotImplementedError(f"{type(self).__name__} has no step")

    def keep(self, batch: Batch) -> None:
        """Third part, always run: what is remembered of the batch."""

    def end_epoch(self, task: Task, phase: Phase, at: Cursor) -> bool:
        """Behind each pass over the source; True ends the phase (early stopping). May read the host."""
        return False

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        """Once, behind the last iteration of a phase."""

    # -- how to answer -------------------------------------------------------------------------------------------
    def features(self, images: Tensor, task: int | None) -> Tensor:
        """(B, C, H, W) -> (B, D). Under view `features` the images are features already."""
        if self.view == "features":
            return images
        out: Tensor = self.backbone(images)
        return out

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """(B, D) features -> (B, C) finite logits. `allowed`: (C,) or (B, C) bool, classes an answer may come from; the
        evaluator masks the logits itself, a method looks at it only if it must do so earlier."""
        raise NotImplementedError(f"{type(self).__name__} has no classify")

    def logits(self, images: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """(B, C, H, W) -> (B, C) finite logits; called without gradients and with all modules in eval mode. `images` is
        the evaluator's own: not to be written into. `task` is the task id in the `task` setting, else None."""
        return self.classify(self.features(images, task), allowed, task)

    @property
    def features_version(self) -> int | None:
        """A number that changes whenever `features` may have changed, so that the evaluator can keep the features of
        its images while only the head moves. None: may change at every step."""
        return 0 if self.frozen_backbone else None

    def head(self, task: int | None) -> Head | None:
        """The classifier over `features`, if it is of a kind that an evaluator can fuse."""
        return None

    def deployed(self) -> contextlib.AbstractContextManager[None]:
        """Inside this context the method answers with the weights to be judged, if they differ from the live ones."""
        return contextlib.nullcontext()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes kept between tasks besides the network, by name, exemplars counted as the images they stand for."""
        return {}

    # -- state ---------------------------------------------------------------------------------------------------
    def modules(self) -> Iterator[nn.Module]:
        """The networks it answers with: the evaluator puts them into eval mode and back."""
        return (value for value in vars(self).values() if isinstance(value, nn.Module))

    def state_dict(self) -> dict[str, Any]:
        """Everything learned. The base collects from the attributes: modules (frozen ones left out), optimisers,
        anything else with `state_dict`/`load_state_dict`, tensors, and plain values (also in lists and dicts).
        Attributes whose names start with `_` are scratch and left out."""
        state: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name in ("config", "setting", "view", "frozen_backbone") or name.startswith("_"):
                continue
            if isinstance(value, nn.Module):
                if not getattr(value, FROZEN_FLAG, False):
                    state[name] = value.state_dict()
            elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
                state[name] = value.state_dict()
            elif is_plain(value):
                state[name] = value
            else:
                raise TypeError(
                    f"{type(self).__name__}.{name} is a {type(value).__name__}, which a checkpoint cannot hold: "
                    f"give it state_dict/load_state_dict, or start its name with '_' if it can be rebuilt"
                )
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for name, value in state.items():
            current = getattr(self, name, None)
            if current is not None and hasattr(current, "load_state_dict"):
                current.load_state_dict(value)
            elif isinstance(current, Tensor) and isinstance(value, Tensor) and current.shape == value.shape:
                with torch.no_grad():
                    current.copy_(value)
            else:
                setattr(self, name, value)


def is_plain(value: Any) -> bool:
    """True for what `torch.load(weights_only=True)` gives back: numbers, strings, tensors, and containers of them."""
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return True
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and is_plain(item) for key, item in value.items())
    return False


def config_fields(config: type) -> dict[str, Any]:
    """Hyperparameters of a Config class: name -> dataclass field (default and `metadata` of `hp`)."""
    out = {}
    for item in fields(config):
        if item.default is MISSING:
            raise TypeError(f"{config.__qualname__}.{item.name} needs a default: declare it with hp(default, help)")
        out[item.name] = item
    return out
