"""A method as it is now, to be evaluated while the living one trains on.

The copy has every module, tensor and plain value of the method, its modules in eval mode; setting, configuration,
optimisers and generators are shared, and so is the memory of frozen modules. `refresh` brings the values up to date
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

from clbench.errors import RunFailed
from clbench.methods.base import FROZEN_FLAG, Method

__all__ = ["Snapshot"]

SHARED = (Optimizer, LRScheduler, ReduceLROnPlateau, torch.Generator)
PLAIN = (bool, int, float, str, type(None))
NOT_FOLLOWED = (type, FunctionType, MethodType, ModuleType)


class Snapshot:
    """`copy` is the method to evaluate. Make a new one where more than values may have changed: modules, their plain
    attributes (`Evaluator.phase_changed`), or where their tensors lie (`fits`). The copy of a compiled
    module is not compiled: that would have to be done again for every copy."""

    def __init__(self, method: Method) -> None:
        self.source = method
        made = object.__new__(type(method))
        self._twin: dict[int, Any] = {  # id of something of the method -> its copy, or itself if it is shared
            id(method): made, id(method.setting): method.setting, id(method.config): method.config
        }  # fmt: skip
        modules, passing = share(vars(method), self._twin)
        try:
            made.__dict__.update(copy.deepcopy(vars(method), self._twin))
        except (TypeError, RuntimeError) as error:
            raise RunFailed(
                f"{type(method).__name__} keeps something that cannot be copied ({error}), so it cannot be evaluated "
                f"beside training; use --evaluator plain"
            ) from error
        for key in passing:  # they are not kept alive, so another tensor may get their id
            del self._twin[key]
        self._copies = {id(value) for value in self._twin.values() if isinstance(value, Tensor)}
        self.copy = made
        for root in made.modules():
            for module in root.modules():
                module.training = False
        self._tensors = {id(module): list(pairs(module, self._twin.get(id(module), module))) for module in modules}
        self._places = [(fro, fro.data_ptr()) for tensors in self._tensors.values() for _, fro in tensors]

    def fits(self) -> bool:
        """Whether the tensors of the living modules lie where they lay: a method may point them elsewhere."""
        return all(tensor.data_ptr() == place for tensor, place in self._places)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy all values from the living method; reads nothing on the host."""
        into: dict[int, tuple[Tensor, Tensor]] = {}  # id of a copy -> it, and what it gets
        self._refresh(vars(self.source), vars(self.copy), into, set())
        alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for copied, living in into.values():  # apart, for a list that mixes them is copied one by one on a GPU
            copies, values = alike.setdefault((copied.device, copied.dtype), ([], []))
            copies.append(copied)
            values.append(living.detach())
        for copies, values in alike.values():
            torch._foreach_copy_(copies, values)

    def plain(self) -> tuple[Any, ...]:
        """The plain values of the method itself, by which captured work is told apart."""
        return tuple((name, value) for name, value in vars(self.copy).items() if isinstance(value, PLAIN))

    def _refresh(
        self, now: dict[Any, Any], old: dict[Any, Any], into: dict[int, tuple[Tensor, Tensor]], done: set[int]
    ) -> None:
        for name, value in now.items():
            had = old.get(name)
            if value is had or isinstance(value, SHARED):
                continue
            if isinstance(value, PLAIN):
                old[name] = value
            elif isinstance(value, Tensor):
                old[name] = self._copied(value, had, into)
            elif isinstance(value, nn.Module):
                if id(value) not in self._tensors:
                    raise RunFailed(
                        f"module {name} of {type(self.source).__name__} is new inside a phase; make it in begin_phase "
                        f"or open_phase, or use --evaluator plain"
                    )
                for to, fro in self._tensors[id(value)]:
                    into.setdefault(id(to), (to, fro))
            elif id(value) not in done:
                done.add(id(value))
                self._refresh_inside(name, value, old, into, done)

    def _copied(self, value: Tensor, had: Any, into: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """The tensor that stands for `value`: its copy. One that has come since has none: the tensor that stood there,
        so that addresses stay, unless it is the copy of something, which may have another name by now, or a view."""
        twin = self._twin.get(id(value))
        if twin is None and isinstance(had, Tensor) and id(had) not in self._copies:
            twin = had
        if not isinstance(twin, Tensor) or not same_form(twin, value):
            return value.detach().clone()
        into.setdefault(id(twin), (twin, value))
        return twin

    def _refresh_inside(
        self, name: Any, value: Any, old: dict[Any, Any], into: dict[int, tuple[Tensor, Tensor]], done: set[int]
    ) -> None:
        had: Any = old.get(name)
        inner, inner_old = members(value), members(had)
        if inner is None or inner_old is None or inner.keys() != inner_old.keys():
            old[name] = value if inner is None else fresh(value)
            return
        self._refresh(inner, inner_old, into, done)
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


def share(values: dict[Any, Any], memo: dict[int, Any]) -> tuple[list[nn.Module], list[int]]:
    """Put into `memo` what a copy shares, and copies of tensors that belong to a graph, which cannot be copied as they
    are. Returns the modules met, and the ids of those tensors."""
    modules: list[nn.Module] = []
    passing: list[int] = []
    waiting, met = [values], set(memo)
    while waiting:
        for value in waiting.pop().values():
            if isinstance(value, PLAIN) or id(value) in met:
                continue
            met.add(id(value))
            if isinstance(value, nn.Module):
                modules.append(value)
                if getattr(value, FROZEN_FLAG, False):  # the copy has tensors of its own, on the same memory
                    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in value.parameters()}
                    memo |= {id(b): b.detach() for b in value.buffers()}
            elif isinstance(value, SHARED):
                memo[id(value)] = value
            elif isinstance(value, Tensor):
                if not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
                    passing.append(id(value))
            else:
                waiting.append(members(value) or {})
    return modules, passing


def pairs(source: nn.Module, made: nn.Module) -> Iterable[tuple[Tensor, Tensor]]:
    """(copy, living) of every parameter and buffer with memory of its own."""
    for kind in ("named_parameters", "named_buffers"):
        living, copied = dict(getattr(source, kind)()), dict(getattr(made, kind)())
        for name, tensor in living.items():
            if copied[name].data_ptr() != tensor.data_ptr():
                yield copied[name], tensor
