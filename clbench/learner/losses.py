"""The losses of a run: kept on the device as they come, copied to the host in blocks, checked for NaN there."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench.errors import RunFailed

__all__ = ["LossLog"]


class LossLog:
    """Long table of (step, name, value)."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._waiting: list[tuple[int, Mapping[str, Tensor]]] = []
        self._steps: list[NDArray[np.int64]] = []
        self._ids: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float64]] = []

    def add(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Keep the 0-d tensors of one step; reads nothing."""
        if losses:
            self._waiting.append((step, losses))

    def __len__(self) -> int:
        return len(self._waiting)

    def drain(self) -> None:
        """Copy what is waiting to the host. Raises RunFailed if a value is NaN or infinite."""
        if not self._waiting:
            return
        steps = [step for step, losses in self._waiting for _ in losses]
        names = [name for _, losses in self._waiting for name in losses]
        flat = torch.stack(
            [value.detach().reshape(()).double() for _, losses in self._waiting for value in losses.values()]
        )
        self._waiting.clear()
        values = flat.cpu().numpy()
        broken = ~np.isfinite(values)
        if broken.any():
            first = int(broken.argmax())
            raise RunFailed(
                f"{names[first]} became {values[first]} at step {steps[first]}; lower the learning rate "
                f"(for example --set lr=...) and start again with --fresh"
            )
        for name in dict.fromkeys(names):
            if name not in self.names:
                self.names.append(name)
        self._steps.append(np.asarray(steps, dtype=np.int64))
        self._ids.append(np.asarray([self.names.index(name) for name in names], dtype=np.int64))
        self._values.append(values)

    def table(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Steps, indices into `names`, values: all that has been drained."""
        if not self._steps:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
        return np.concatenate(self._steps), np.concatenate(self._ids), np.concatenate(self._values)

    def state_dict(self) -> dict[str, Any]:
        steps, ids, values = self.table()
        return {
            "names": list(self.names),
            "steps": torch.from_numpy(steps),
            "ids": torch.from_numpy(ids),
            "values": torch.from_numpy(values),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.names = list(state["names"])
        self._waiting.clear()
        self._steps, self._ids = [state["steps"].numpy()], [state["ids"].numpy()]
        self._values = [state["values"].numpy()]
