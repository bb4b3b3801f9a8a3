"""Runs methods on a device that is not the CPU and need not be there, and prints what went wrong on it as JSON.

    python tests/learner/other_device.py '{"method": "er", ...}' ...

Arguments: run specifications. On the device `other` every tensor holds one on the CPU, which does the work, so a run is
carried out for real; what a GPU would refuse is written down: an operation on tensors of both devices, and random
numbers from a generator of the wrong one. Not simulated: streams, graphs, `parameter.data = ...`, the cost of anything.

A process of its own, because PyTorch is told of the device for good, and generators and `torch.tensor` are replaced.
"""

import json
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

FREE = {"aten._to_copy.default", "aten.copy_.default"}  # go from one device to the other
INDEXING = {"aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._unsafe_index_put.default"}
TORCH = Path(torch.__file__).parent
problems: Counter[str] = Counter()


# -- the device --------------------------------------------------------------------------------------------------------
class Module(backend_registration._DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def is_autocast_enabled(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0


backend_registration._setup_privateuseone_for_python_backend("other", Module())
OTHER = torch.device("other:0")


def is_other(device: Any) -> bool:
    return device is not None and torch.device(device).type == "other"


def held(value: Any) -> Any:
    """What the CPU works on instead."""
    if isinstance(value, OtherTensor):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "other" else value


def note(problem: str) -> None:
    """Count it, at the last line that is neither PyTorch's nor of this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path != Path(__file__) and TORCH not in path.parents:
            problems[f"{path.name}:{frame.lineno}: {problem}"] += 1
            return


class OtherTensor(Tensor):
    """A tensor of the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OtherTensor":
        return Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=OTHER,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), named=None):
        return carry_out(operation, arguments, named or {})

    def tolist(self) -> list:
        return self.held.tolist()

    def __setitem__(self, key: Any, value: Any) -> None:
        keys = key if isinstance(key, tuple) else (key,)
        if on_cpu(value) and any(isinstance(each, Tensor) for each in keys):
            note("setitem takes values of another device")
        with _disable_current_modes(), torch.no_grad():
            self.held[tuple(held(each) for each in keys)] = held(value)


def on_cpu(value: Any) -> bool:
    """A number in a tensor may be anywhere."""
    return isinstance(value, Tensor) and not isinstance(value, OtherTensor) and value.dim() > 0


def carry_out(operation, arguments: tuple, named: dict[str, Any]) -> Any:
    name = str(operation)
    flat, form = tree_flatten((arguments, named))
    given = [value for value in flat if isinstance(value, OtherTensor)]
    device = named.get("device")
    works_here = is_other(device) or bool(given)
    if given and name not in FREE:
        # indices may come from the CPU, what is indexed and what is put there may not
        strict = [arguments[0], *arguments[2:]] if name in INDEXING else flat
        if any(on_cpu(value) for value in strict):
            note(f"{name} on tensors of two devices")
    for generator in (value for value in flat if isinstance(value, torch._C.Generator)):
        if works_here not in Generator.made.get(generator.initial_seed(), {False}):
            note(f"{name} with a generator of another device")
    by_held = {id(value.held): value for value in given}
    unwrapped, unwrapped_named = tree_unflatten([held(value) for value in flat], form)
    with _disable_current_modes():
        result = operation(*unwrapped, **unwrapped_named)
    if name == "aten.copy_.default":
        stays = isinstance(arguments[0], OtherTensor)
    else:
        stays = is_other(device) or (bool(given) and device is None)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OtherTensor):
            return value
        return by_held.get(id(value), OtherTensor(value) if stays else value)

    return tree_map(wrapped, result)


class Dispatch(TorchDispatchMode):
    """For what makes tensors from nothing."""

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        return carry_out(operation, arguments, named or {})


class Generator(torch.Generator):
    """Draws on the CPU, and is known by its seed: PyTorch hands on the inner part only. made: seed -> whether for the
    other device."""

    made: ClassVar[dict[int, set[bool]]] = {}

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        made.other = is_other(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return OTHER if self.other else torch.device("cpu")

    def manual_seed(self, seed: int) -> "Generator":
        super().manual_seed(seed)
        self.made.setdefault(self.initial_seed(), set()).add(self.other)
        return self


def install() -> None:
    """Have generators and `torch.tensor` know the device."""
    plain = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = plain(data, **options)
        return made if device is None else made.to(device)

    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` keeps its parameters, as for a GPU
    torch.tensor = tensor
    torch.Generator = Generator
    torch.inference_mode = lambda mode=True: torch.no_grad()  # its tensors cannot be wrapped


# -- runs --------------------------------------------------------------------------------------------------------------
def main(wanted: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    install()
    from clbench.learner import resolve
    from clbench.learner.check import finished
    from clbench.learner.spec import RunSpec

    resolve.find_device = lambda name: OTHER
    found = []
    for text in wanted:
        problems.clear()
        with Dispatch():
            learner = finished(RunSpec(**json.loads(text)))
        parameters = [each for module in learner.method.modules() for each in module.parameters()]
        found.append(
            {
                "problems": dict(problems),
                "devices": sorted({str(each.device) for each in parameters}),
                "hits": [int(hits.sum()) for _, hits in learner.matrix],
            }
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
