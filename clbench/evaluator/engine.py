"""How an observation is carried out: on the living method, or on a snapshot beside training, or as a CUDA graph.

`plain`: on the method itself, on the stream it trains on. `snapshot`: its values are copied, and the evaluation runs on
a stream of its own while training goes on. `graph`: as snapshot, and an evaluation that has been launched once with the
same groups, masks and plain values is captured and from then on replayed by one launch.

On a CPU there are no streams: `snapshot` copies and evaluates in turn, by the same code, with the same hits to the bit.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from clbench.errors import RunFailed
from clbench.evaluator.snapshot import Snapshot
from clbench.methods.base import Method

__all__ = ["Count", "Engine", "EngineName", "PlainEngine", "SnapshotEngine", "make_engine", "watching"]

EngineName = Literal["plain", "snapshot", "graph"]
Count = Callable[[Method, Tensor], None]  # adds (G,) int64 hits of a method in eval mode to the row it is given


class Engine(Protocol):
    """Carries out observations."""

    def observe(self, method: Method, key: Hashable, count: Count, row: Tensor) -> None:
        """Add the hits of `method` as it is now to `row`, reading nothing back. `key` says which work `count` does: the
        same key means the same tensors in the same places."""

    def wait(self) -> None:
        """Have the current stream wait for all observations; must stand before their rows are read or moved."""

    def changed(self) -> None:
        """More than the values of the method's tensors may have changed."""


class PlainEngine:
    """On the method itself."""

    def observe(self, method: Method, key: Hashable, count: Count, row: Tensor) -> None:
        with watching(method):
            count(method, row)

    def wait(self) -> None:
        pass

    def changed(self) -> None:
        pass


class Side:
    """A stream beside the current one; nothing at all on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """What is launched here next runs behind all that the current stream has been given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def join(self) -> None:
        """What the current stream is given next runs behind all that was launched here."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def __enter__(self) -> None:
        self._inside = torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()
        self._inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)


class SnapshotEngine:
    """On a snapshot, beside training. graph: capture what is repeated; needs a CUDA device.

    launched: observations launched kernel by kernel; replayed: those by one launch. A method whose plain attributes
    change at every step is never replayed, since what it computes may depend on them.
    """

    def __init__(self, device: torch.device, *, graph: bool = False) -> None:
        if graph and device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, not {device}")
        self.graph = graph
        self.launched = self.replayed = 0
        self._device = device
        self._side = Side(device)
        self._snapshot: Snapshot | None = None
        self._seen: Hashable = None
        self._captured: Captured | None = None

    def observe(self, method: Method, key: Hashable, count: Count, row: Tensor) -> None:
        self._side.join()  # the copy is still read by the evaluation before this one
        if self._snapshot is None or self._snapshot.source is not method or not self._snapshot.fits():
            self._snapshot = Snapshot(method)
            self._captured = None
        else:
            self._snapshot.refresh()
        self._side.follow()
        whole_key = (key, self._snapshot.plain(), torch.is_autocast_enabled(self._device.type)) if self.graph else None
        with self._side, torch.no_grad():
            if self._captured is not None and self._captured.key == whole_key:
                self._replay(row)
            elif self.graph and self._seen == whole_key:
                self._captured = Captured(whole_key, self._snapshot.copy, count, row)
                self._replay(row)
            else:
                self._captured = None
                count(self._snapshot.copy, row)
                self.launched += 1
        self._seen = whole_key

    def _replay(self, row: Tensor) -> None:
        assert self._captured is not None
        self._captured.replay(row)
        self.replayed += 1

    def wait(self) -> None:
        self._side.join()

    def changed(self) -> None:
        self._side.join()
        self._snapshot = self._captured = None
        self._seen = None


class Captured:
    """One evaluation as a CUDA graph. It holds the addresses of what it reads, so it keeps the method and `count`."""

    def __init__(self, key: Hashable, method: Method, count: Count, row: Tensor) -> None:
        self.key = key
        self._kept = (method, count)
        self._hits = torch.zeros_like(row)
        self._graph = torch.cuda.CUDAGraph()
        try:
            # other threads may use CUDA meanwhile (a run beside this one, the data loader of a strategy)
            with torch.cuda.graph(
                self._graph, stream=torch.cuda.current_stream(row.device), capture_error_mode="thread_local"
            ):
                self._hits.zero_()
                count(method, self._hits)
        except RuntimeError as error:
            raise RunFailed(
                f"the evaluation of {type(method).__name__} cannot be captured in a CUDA graph ({error}); "
                f"use --evaluator snapshot"
            ) from error

    def replay(self, row: Tensor) -> None:
        self._graph.replay()
        row.add_(self._hits)


def make_engine(name: EngineName, device: torch.device) -> Engine:
    """The engine of that name."""
    if name == "plain":
        return PlainEngine()
    return SnapshotEngine(device, graph=name == "graph")


@contextlib.contextmanager
def watching(method: Method) -> Iterator[None]:
    """Eval mode for all modules of a method, without gradients; every module's own mode is put back."""
    training = [module for root in method.modules() for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
