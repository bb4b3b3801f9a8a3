"""A method as it is now, to be evaluated while the living one trains on.

The copy has every module, tensor and plain value of the method, its modules in eval mode; what answering does not write
to is shared: setting, configuration, optimisers, generators, frozen modules. `refresh` brings the values up to date
with one `torch._foreach_copy_`. The living method is only read: modes, batch-norm buffers and gradients stay as they
are.
"""

import copy
from collections.abc import Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from clbench.methods.base import FROZEN_FLAG, Method

__all__ = ["Snapshot"]

SHARED = (Optimizer, LRScheduler, ReduceLROnPlateau, torch.Generator)
PLAIN = (bool, int, float, str, type(None))
NOT_FOLLOWED = (type, FunctionType, MethodType, ModuleType)


class Snapshot:
    """`copy` is the method to evaluate. Make a new one where more than values may have changed: modules, their plain
    attributes, the keys of a dict (`Evaluator.phase_changed`)."""

    def __init__(self, method: Method) -> None:
        self.source = method
        made = object.__new__(type(method))
        memo: dict[int, Any] = {
            id(method): made, id(method.setting): method.setting, id(method.config): method.config
        }  # fmt: skip
        modules = share(vars(method), memo)
        made.__dict__.update(copy.deepcopy(vars(method), memo))
        self.copy = made
        for root in made.modules():
            for module in root.modules():
                module.training = False
        self._tensors = {id(module): list(pairs(module, memo.get(id(module), module))) for module in modules}

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy all values from the living method; reads nothing on the host."""
        into: dict[int, Tensor] = {}
        source: list[Tensor] = []
        self._refresh(vars(self.source), vars(self.copy), into, source, set())
        if into:
            torch._foreach_copy_(list(into.values()), source)

    def plain(self) -> tuple[Any, ...]:
        """The plain values of the method itself, by which captured work is told apart."""
        return tuple((name, value) for name, value in vars(self.copy).items() if isinstance(value, PLAIN))

    def _refresh(
        self, now: dict[Any, Any], old: dict[Any, Any], into: dict[int, Tensor], source: list[Tensor], done: set[int]
    ) -> None:
        for name, value in now.items():
            had = old.get(name)
            if value is had or isinstance(value, SHARED):
                continue
            if isinstance(value, PLAIN):
                old[name] = value
            elif isinstance(value, Tensor):
                if isinstance(had, Tensor) and same_form(had, value):
                    if id(had) not in into:
                        into[id(had)] = had
                        source.append(value.detach())
                else:
                    old[name] = value.detach().clone()
            elif isinstance(value, nn.Module):
                if id(value) not in self._tensors:
                    raise RuntimeError(f"module {name} of {type(self.source).__name__} is new inside a phase")
                for to, fro in self._tensors[id(value)]:
                    if id(to) not in into:
                        into[id(to)] = to
                        source.append(fro)
            elif id(value) not in done:
                done.add(id(value))
                self._refresh_inside(name, value, old, into, source, done)

    def _refresh_inside(
        self, name: Any, value: Any, old: dict[Any, Any], into: dict[int, Tensor], source: list[Tensor], done: set[int]
    ) -> None:
        had: Any = old.get(name)
        inner, inner_old = members(value), members(had)
        if inner is None or inner_old is None or inner.keys() != inner_old.keys():
            old[name] = value if inner is None else fresh(value)
            return
        self._refresh(inner, inner_old, into, source, done)
        if isinstance(value, list):
            had[:] = inner_old.values()
        elif isinstance(value, tuple) and any(a is not b for a, b in zip(had, inner_old.values(), strict=True)):
            old[name] = rebuilt(had, inner_old.values())


def same_form(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def members(value: Any) -> dict[Any, Any] | None:
    """What a container or an object holds, by key; None for what is not followed (functions, classes, arrays, sets)."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, NOT_FOLLOWED):
        return None
    return getattr(value, "__dict__", None)


def rebuilt(like: Any, values: Iterable[Any]) -> Any:
    """A tuple, or named tuple, of the same kind."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def fresh(value: Any) -> Any:
    memo: dict[int, Any] = {}
    share({"": value}, memo)
    return copy.deepcopy(value, memo)


def share(values: dict[Any, Any], memo: dict[int, Any]) -> list[nn.Module]:
    """Put into `memo` what a copy shares, and tensors that belong to a graph, which cannot be copied as they are.
    Returns the modules met."""
    modules: list[nn.Module] = []
    waiting, met = [values], set(memo)
    while waiting:
        for value in waiting.pop().values():
            if isinstance(value, PLAIN) or id(value) in met:
                continue
            met.add(id(value))
            if isinstance(value, nn.Module):
                modules.append(value)
                if getattr(value, FROZEN_FLAG, False):
                    memo[id(value)] = value
            elif isinstance(value, SHARED):
                memo[id(value)] = value
            elif isinstance(value, Tensor):
                if not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
            else:
                waiting.append(members(value) or {})
    return modules


def pairs(source: nn.Module, made: nn.Module) -> Iterable[tuple[Tensor, Tensor]]:
    """(copy, living) of every parameter and buffer that is not shared."""
    for kind in ("named_parameters", "named_buffers"):
        living, copied = dict(getattr(source, kind)()), dict(getattr(made, kind)())
        for name, tensor in living.items():
            if copied[name] is not tensor:
                yield copied[name], tensor.detach()
