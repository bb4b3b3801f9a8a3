"""Joint training: at every task, train on all data seen so far. The upper bound.

With `restart` the network starts each task from its initial weights, so that the last accuracy is that of ordinary
training on everything; without, it goes on from the weights of the task before (incremental joint training, which
still shows a stability gap: Hess et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from clbench.methods._softmax import SgdConfig, SoftmaxMethod
from clbench.methods.base import Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Cursor, Phase


@dataclass(frozen=True)
class JointConfig(SgdConfig):
    """Hyperparameters of joint training."""

    epochs: int = hp(0, "passes over all data seen so far, at each task; 0 takes the scenario's", low=0, high=1000)
    restart: bool = hp(True, "start every task from the initial weights")


class Joint(SoftmaxMethod):
    """One phase per task over the rows of all tasks so far, reshuffled each epoch."""

    Config = JointConfig
    aliases = ("cumulative", "multitask")
    graphable = True

    def __init__(self, config: JointConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self._initial: dict[str, Any] = {
            name: {key: value.clone() for key, value in module.state_dict().items()}
            for name, module in (("backbone", backbone), ("classifier", self.classifier))
        }

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        return [Phase("train", source="seen", epochs=self.config.epochs or None, view=self.training_view)]

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if self.config.restart:
            for name, state in self._initial.items():
                getattr(self, name).load_state_dict(state)
            self.optimizer.state.clear()


METHOD = Joint
