"""WiSE-FT on a stream: fine-tune, then go back a fifth of the way to where the task began.

Wortsman et al., CVPR 2022, as the MTIL table uses it (mtil card, section 2, baselines): behind each task
`theta <- alpha theta_trained + (1 - alpha) theta_start` with alpha 0.8; the merged weights answer, and the next task
starts from them. alpha 1 is continual fine-tuning, alpha 0 zero-shot for ever.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from clbench.methods._clip import ClipConfig, ClipMethod, bytes_of, interpolate
from clbench.methods.base import Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Cursor, Phase


@dataclass(frozen=True)
class WiSEFTConfig(ClipConfig):
    """The common recipe and the share of the trained weights."""

    alpha: float = hp(
        0.8, "share of the trained weights behind a task", low=0.0, high=1.0, source="mtil card, section 2",
        tune={"low": 0.3, "high": 0.95},
    )  # fmt: skip


class WiSEFT(ClipMethod):
    """Continual fine-tuning with one merge per task."""

    Config = WiSEFTConfig
    settings = frozenset({"class", "task"})
    aliases = ("wise-ft", "wise")
    config: WiSEFTConfig

    def __init__(self, config: WiSEFTConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.start: list[Tensor] = []  # weights as the task began

    def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        super().begin_phase(task, phase, at)
        self.start = [weight.detach().clone() for weight in self._weights]

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        interpolate(self._weights, self.start, self.config.alpha)
        self.start = []
        super().end_phase(task, phase, at)

    def memory_bytes(self) -> dict[str, int]:
        return {"weights_at_start": bytes_of(self._weights)}


METHOD = WiSEFT
