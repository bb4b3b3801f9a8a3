"""A training step of which the middle part is one launch: `draw`, then `update` as a CUDA graph, then `keep`.

For methods that declare `graphable` (see `Method.update`). Inputs of `update` are copied into tensors that stay where
they are, one set per signature (shapes and kinds, and the plain numbers of the optimisers: a learning rate that is a
number is fixed in a graph, one that is a device tensor is read at every launch). The first steps of a signature are
launched kernel by kernel, which also makes the optimiser's state; then one is captured, and the rest launched whole.

Call it as `step(batch)` on the stream that the run trains on; it launches there and reads nothing on the host. On a CPU
it does all but the capture, so that tests run the same code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clbench.errors import InputError, RunFailed
from clbench.methods.base import Method
from clbench.stream.types import Batch, Cursor, Phase

__all__ = ["GraphedStep", "check_graphable"]

WARM_UP = 3  # launches of a signature before it is captured
MOST = 32  # signatures of one phase; more means that a number changes all the time


def check_graphable(cls: type[Method], name: str) -> None:
    """Raise InputError unless the method declares `graphable` itself and has its step in three parts."""
    if not vars(cls).get("graphable", False):
        raise InputError(
            f"method {name} does not say that its step can be captured in a CUDA graph; leave out --cuda-graph"
        )
    if cls.step is not Method.step:
        raise InputError(
            f"method {name} declares graphable but overrides step; give it draw, update and keep instead, or leave out "
            f"--cuda-graph"
        )


class GraphedStep:
    """`step(batch) -> losses`, the same numbers as `method.step(batch)`.

    Make a new one for every phase, once the optimisers are there and restored. launched, replayed: steps of either
    kind. Raises RunFailed where a step cannot be captured.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        self.method = method
        self.launched = self.replayed = 0
        self._device = device
        self._places: dict[Any, _Place] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._optimizers = [value for value in vars(method).values() if isinstance(value, Optimizer)]
        if self._stream is not None:
            for optimizer in self._optimizers:
                make_capturable(optimizer)

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        method = self.method
        losses = self._update(method.draw(batch))
        method.keep(batch)
        return losses

    def _update(self, inputs: Any) -> Mapping[str, Tensor]:
        given: list[Tensor] = []
        form = signature(inputs, given)
        key = (form, tuple(numbers(optimizer) for optimizer in self._optimizers))
        place = self._places.get(key)
        if place is None:
            if len(self._places) == MOST:
                raise RunFailed(
                    f"{type(self.method).__name__} needs more than {MOST} CUDA graphs in one phase: its batches or its "
                    f"optimiser's numbers change all the time (a learning rate may be a device tensor); leave out "
                    f"--cuda-graph"
                )
            place = self._places[key] = _Place(inputs)
        if given:
            torch._foreach_copy_(place.tensors, given)
        if place.graph is None and (self._stream is None or place.launches < WARM_UP):
            return self._launch(place)
        if place.graph is None:
            self._capture(place)
        assert place.graph is not None
        place.graph.replay()
        self.replayed += 1
        return {name: value.clone() for name, value in place.losses.items()}

    def _launch(self, place: "_Place") -> Mapping[str, Tensor]:
        plain = plain_values(self.method) if place.launches == 0 else None
        losses = self._launch_update(place)
        if plain is not None:
            changed = sorted(name for name, value in plain_values(self.method).items() if plain.get(name) != value)
            if changed:
                raise RunFailed(
                    f"{type(self.method).__name__}.update changes {', '.join(changed)}, which a CUDA graph would not "
                    f"do; change it in keep, or leave out --cuda-graph"
                )
        place.launches += 1
        self.launched += 1
        return losses

    def _launch_update(self, place: "_Place") -> Mapping[str, Tensor]:
        if self._stream is None:
            return self.method.update(place.inputs)
        # gradients remember the stream that made them, so these steps run where the capture will
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            losses = self.method.update(place.inputs)
        current.wait_stream(self._stream)
        for value in losses.values():
            value.record_stream(current)
        return losses

    def _capture(self, place: "_Place") -> None:
        graph = torch.cuda.CUDAGraph()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)  # gradients then lie in the graph's own memory
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                losses = self.method.update(place.inputs)
        except RuntimeError as error:
            raise RunFailed(
                f"the step of {type(self.method).__name__} cannot be captured in a CUDA graph ({error}); leave out "
                f"--cuda-graph"
            ) from error
        place.losses, place.graph = losses, graph


class _Place:
    """Inputs that stay where they are, and the graph that reads them."""

    def __init__(self, inputs: Any) -> None:
        self.tensors: list[Tensor] = []
        self.inputs = held(inputs, self.tensors)
        self.launches = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.losses: Mapping[str, Tensor] = {}


def signature(value: Any, tensors: list[Tensor]) -> Any:
    """Shapes, kinds and plain values of inputs, without where the run is; their tensors are put into the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype, value.stride()
    if isinstance(value, Cursor):
        return None
    if isinstance(value, Phase):
        return value.view
    if isinstance(value, Batch):
        value = value._replace(epoch=0, last_update=True)  # what `keep` looks at
    if isinstance(value, tuple | list):
        return tuple(signature(item, tensors) for item in value)
    return value


def held(value: Any, tensors: list[Tensor]) -> Any:
    """A copy of inputs whose tensors are kept; where the run is, is left out, so that `update` can't depend on it."""
    if isinstance(value, Tensor):
        kept = torch.empty_like(value)
        tensors.append(kept)
        return kept
    if isinstance(value, Cursor):
        return None
    if isinstance(value, tuple | list):
        items = [held(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def numbers(optimizer: Optimizer) -> tuple[Any, ...]:
    """Numbers of an optimiser's groups that a graph fixes: plain ones, and tensors on the host if weights are not."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        for value in group.values():
            if isinstance(value, int | float):
                found.append(value)
            elif isinstance(value, Tensor) and value.device.type == "cpu" and on_a_device(group["params"]):
                found.append(value.item())
    return tuple(found)


def on_a_device(parameters: list[nn.Parameter]) -> bool:
    return bool(parameters) and parameters[0].device.type != "cpu"


def plain_values(method: Method) -> dict[str, Any]:
    """Numbers and texts among the attributes of a method and of what it keeps (a buffer's count)."""
    found = {}
    for name, value in vars(method).items():
        if isinstance(value, int | float | str):
            found[name] = value
        elif not isinstance(value, nn.Module | Optimizer | Tensor) and name not in ("config", "setting"):
            inner = getattr(value, "__dict__", {})
            found |= {f"{name}.{key}": item for key, item in inner.items() if isinstance(item, int | float | str)}
    return found


def make_capturable(optimizer: Optimizer) -> None:
    """Have an optimiser that counts its steps (Adam) count them on the device, and take its rate from there. SGD with a
    rate that is a device tensor takes it from there in its fused form only; a rate that is a number stays one."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and isinstance(group["lr"], Tensor):
            group["fused"], group["foreach"] = True, False
        if "capturable" not in group or not group["params"]:
            continue
        device = group["params"][0].device
        group["capturable"] = True
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
        for parameter in group["params"]:
            step = optimizer.state.get(parameter, {}).get("step")
            if step is not None:
                optimizer.state[parameter]["step"] = torch.as_tensor(step, dtype=torch.float32, device=device)
