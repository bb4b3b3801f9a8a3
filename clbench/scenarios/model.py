"""The scenario: an index table that says which rows come when, as what, and how answers are counted.

Tables only, no images: builders run in milliseconds, and two scenarios are the same exactly if their fingerprints are.
Shapes: N rows of the store, C classes of the scenario, n rows of a task, g rows of a group.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clbench.data.classes import ClassTable

__all__ = ["Domains", "Group", "Scenario", "StreamDefaults", "Task", "without_domain"]

SettingName = Literal["class", "task", "domain"]


class Task(NamedTuple):
    """One entry of the stream (the field's *experience*).

    rows, targets: (n,) int64 rows of the store and the class ids shown to the learner; in arrival order if online.
    classes: (c,) int64 class ids that this task introduces (may be empty).
    domain: (n,) int64 index into `Scenario.domains`, or None.
    val: rows and targets kept out of training for model selection, or None.
    """

    rows: Tensor
    targets: Tensor
    classes: Tensor
    domain: Tensor | None = None
    val: tuple[Tensor, Tensor] | None = None
    name: str = ""


class Group(NamedTuple):
    """An evaluation bucket: a task, a label level, a domain, or one class.

    rows, targets: (g,) int64 test rows and the class ids that count as right.
    classes: int64 class ids that an answer may come from (the mask `task`; for `seen` also cut to unlocked classes).
    task: index of the task it belongs to; None if it belongs to no single one.
    level: label level of the targets.
    """

    name: str
    rows: Tensor
    targets: Tensor
    classes: Tensor
    task: int | None = None
    domain: Tensor | None = None
    level: int = 0


def without_domain(groups: Sequence[Group]) -> Group | None:
    """The first group that does not say the domain of its rows while others do; None if all or none do. Groups without
    rows have nothing to say."""
    some = [group for group in groups if len(group.rows)]
    silent = [group for group in some if group.domain is None]
    return silent[0] if 0 < len(silent) < len(some) else None


class Domains(NamedTuple):
    """How a stored image is changed before its view; `table` is int64 with one row per domain.

    kind `permutation`, table (num_domains, H*W): pixel p of the result is pixel table[d, p], in every channel.
    kind `rotation`, table (num_domains, 1): turned about its centre by so many degrees, anticlockwise, bilinear; what
        comes in from outside is 0.
    kind `overlay`, table (num_domains, H*W): pixel p is set to the grey value table[d, p] in 0..255; -1 leaves it.
    """

    kind: Literal["permutation", "rotation", "overlay"]
    table: Tensor


@dataclass(frozen=True)
class StreamDefaults:
    """What the source of a scenario prescribes; run options override it.

    batch_size: rows per iteration. epochs: passes per task where not online. updates_per_batch: optimiser steps on
    each batch. drop_last: leave out a ragged last batch. eval_every / eval_dense / eval_per_group: evaluate after each
    of the first `eval_dense` steps behind a task switch, then every `eval_every` steps, on at most `eval_per_group`
    rows per group; `eval_every=None` lets the evaluator size it so that it costs no more than training.
    eval_samples: evaluate by samples instead, as the Si-Blurry protocol does: behind the batch with which more than a
    further multiple of so many samples has been streamed.
    train_view / test_view: see `clbench.data.views`.
    """

    batch_size: int = 10
    epochs: int = 1
    updates_per_batch: int = 1
    drop_last: bool = False
    eval_every: int | None = None
    eval_dense: int = 50
    eval_per_group: int = 200
    eval_samples: int | None = None
    train_view: str = ""
    test_view: str = ""


@dataclass(frozen=True)
class Scenario:
    """A complete index table. `first_seen`: (C,) int64 position in the stream (rows of all earlier tasks, plus rows
    of this one) at which a class unlocks: its task's start, or its first sample. Rows count through all data sets, in
    the order of `datasets`. recall: tests ask for the very rows that were trained on (the instance test)."""

    id: str
    datasets: tuple[str, ...]
    setting: SettingName
    tasks: tuple[Task, ...]
    groups: tuple[Group, ...]
    classes: ClassTable
    first_seen: Tensor
    online: bool = False
    defaults: StreamDefaults = StreamDefaults()
    domains: Domains | None = None
    prompts: Mapping[int, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    recall: bool = False
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Stream position at which each task starts, and the total length as last entry: K + 1 integers."""
        out = [0]
        for task in self.tasks:
            out.append(out[-1] + len(task.rows))
        return tuple(out)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides what is trained on and what counts as right (not the defaults)."""
        digest = hashlib.sha256()

        def add(label: str, value: Any) -> None:
            digest.update(f"\n{label}:".encode())
            if isinstance(value, Tensor):
                array = value.detach().cpu().to(torch.int64).numpy()
                digest.update(str(array.shape).encode() + array.astype("<i8").tobytes())
            else:
                digest.update(json.dumps(value, sort_keys=True).encode())

        add("head", [self.id, list(self.datasets), self.setting, self.online, list(self.classes.names)])
        add("level", self.classes.level)
        add("parent", self.classes.parent)
        add("first_seen", self.first_seen)
        for index, task in enumerate(self.tasks):
            val = task.val if task.val is not None else (None, None)
            for name, value in zip(
                ("rows", "targets", "classes", "domain", "val_rows", "val_targets"),
                (task.rows, task.targets, task.classes, task.domain, *val),
                strict=True,
            ):
                add(f"task{index}.{name}", value)
        for index, group in enumerate(self.groups):
            add(f"group{index}", [group.name, group.task, group.level])
            for name, value in zip(
                ("rows", "targets", "classes", "domain"),
                (group.rows, group.targets, group.classes, group.domain),
                strict=True,
            ):
                add(f"group{index}.{name}", value)
        if self.domains is not None:
            add(self.domains.kind, self.domains.table)
        add("prompts", {str(k): list(v) for k, v in self.prompts.items()})
        return digest.hexdigest()
