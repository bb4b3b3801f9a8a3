"""A guard that turns any host read inside a step or an observation into an error, on a CPU too.

On a GPU a host read (`.item()`, `if tensor`, a boolean mask, `.cpu()`) makes the processor wait for the device at every
iteration. On a CPU it costs nothing, so tests need this guard to see it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostRead", "forbid_host_reads"]


class HostRead(AssertionError):
    """Something read a tensor's value on the host."""


# what reads values: one number, a data-dependent size, or a whole tensor
READING_OPS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
}  # fmt: skip
READING_CALLS = {"cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__float__", "__int__", "__index__"}


@contextmanager
def forbid_host_reads() -> Iterator[None]:
    """Raise HostRead at the first host read inside the block. Optimisers may read their own step counters, which they
    keep on the host."""
    paused = 0

    def pause(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal paused
        paused += 1

    def resume(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal paused
        paused -= 1

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
            name = func.name().split(".")[0]
            boolean_index = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and any(
                isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
            )
            if not paused and (name in READING_OPS or boolean_index):
                raise HostRead(f"{name} reads a tensor on the host")
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not paused and getattr(func, "__name__", "") in READING_CALLS:
                raise HostRead(f"Tensor.{func.__name__} reads a tensor on the host")
            return func(*args, **(kwargs or {}))

    hooks = [register_optimizer_step_pre_hook(pause), register_optimizer_step_post_hook(resume)]
    try:
        with Dispatch(), Function():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            yield
    finally:
        for hook in hooks:
            hook.remove()
