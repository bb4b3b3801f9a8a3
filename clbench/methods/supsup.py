"""SupSup: a supermask per task over fixed random weights; nothing but masks is learned.

Idea: all weights are signed constants that never change; a task learns scores, and keeps the bits of its mask (and
running batch-norm statistics). Nothing is shared but the weights, so nothing is forgotten. No exemplars.

Setting `task`: the task of an image is known (GG). Setting `class`: it is inferred from the images (GN), by superposed
masks; see `_task_inference.py`.

Paper: Wortsman et al.: Supermasks in Superposition (NeurIPS 2020). Official code: RAIVNLab/supsup; the training is that
of prateeky2806/exessnet, where SupSup is the baseline. Spec: card `exssnet`. What differs: `_mask_training.py`.

Shapes: B batch, C classes of the scenario, c outputs of the head, P masked weights, T tasks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.errors import InputError
from clbench.methods._mask_training import NEVER, MaskTraining, SupermaskConfig
from clbench.methods._task_inference import forward_blocks, infer_tasks, named_objective
from clbench.methods.base import Setting, hp

__all__ = ["METHOD", "SupSup", "SupSupConfig"]

BLOCK_BYTES = 64 * 2**20  # superposed weights in memory at once


@dataclass(frozen=True)
class SupSupConfig(SupermaskConfig):
    """The last five matter in setting `class` (card, section 2)."""

    rule: str = hp(
        "top", "mask from scores s: the largest |s| of each layer (top), or s >= 0 whatever the density (threshold)",
        choices=("top", "threshold"), source="card, section 2: threshold where the official code infers tasks",
    )  # fmt: skip
    inference: str = hp(
        "oneshot", "task of an image: from one gradient (oneshot), or by halving the candidates (binary)",
        choices=("oneshot", "binary"), source="card, section 2",
    )  # fmt: skip
    objective: str = hp(
        "entropy", "what the right task lowers: entropy of the answer, or log-sum-exp of superfluous outputs (g)",
        choices=("entropy", "g"), source="card, section 2",
    )  # fmt: skip
    superfluous: int = hp(0, "outputs that no class has, for the objective g", low=0, high=10_000, source="ours: none")
    vote: int = hp(
        1, "test images in a row that are taken to be of one task and decide together; above 1 the order of the test "
        "images tells something", low=1, high=100_000, unit="images", source="ours; official code: a test batch (128)",
    )  # fmt: skip


class SupSup(MaskTraining):
    """See the module. One phase per task (and `probe` with KKT)."""

    Config = SupSupConfig
    settings = frozenset({"class", "task"})
    mask = "seen"
    config: SupSupConfig

    def __init__(self, config: SupSupConfig, backbone: nn.Module, setting: Setting) -> None:
        if config.objective == "g" and not config.superfluous:
            raise InputError(
                "supsup: objective=g reads outputs that no class has, and superfluous=0 gives none: set "
                "superfluous=100 or so, or objective=entropy"
            )
        self.extra_outputs, self._threshold = config.superfluous, config.rule == "threshold"
        super().__init__(config, backbone, setting)
        self.signed = not self._threshold
        self._objective = named_objective(config.objective, self._num_outputs)
        table = torch.full((len(self._tasks), self._num_outputs), setting.num_classes, device=setting.device)
        for task, classes in enumerate(self._class_at):
            table[task, : len(classes)] = classes
        self._class_table = table  # (T, c) class ids; C where a task has fewer classes

    def _mask(self, scores: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if not self._threshold:
            return super()._mask(scores, out)
        mask = (self.scores if scores is None else scores) >= 0
        return mask.to(self.scores.dtype) if out is None else out.copy_(mask)

    def logits(self, images: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """(B, C): by the task's mask; with `task` None by the mask of the task that is inferred, whose classes alone
        are answered."""
        if task is not None or len(images) == 0:
            return super().logits(images, allowed, 0 if task is None else task)
        begun = max(self.num_finished + (self.current is not None), 1)
        weights = torch.stack([self.effective_of(candidate) for candidate in range(begun)])
        vote = min(self.config.vote, len(images))
        whole = len(images) // vote * vote
        at_once = max(BLOCK_BYTES // weights[0].nbytes, 1) * vote
        parts = [part.unflatten(0, (-1, vote)) for part in images[:whole].split(at_once)]
        parts += [images[None, whole:]] if whole < len(images) else []
        return torch.cat([self._answer(part, weights) for part in parts])

    def _answer(self, images: Tensor, weights: Tensor) -> Tensor:
        """Logits (N * V, C) of blocks of images (N, V, ...); weights: (n, P) of the candidates."""
        statistics = self.statistics[: len(weights)]
        binary = self.config.inference == "binary"
        tasks = infer_tasks(self._network, weights, statistics, images, self._objective, binary=binary)
        outputs = forward_blocks(self._network, weights[tasks], statistics[tasks], images)
        outputs = outputs[..., : self._num_outputs]
        classes = self._class_table[tasks][:, None].expand(outputs.shape)
        every = outputs.new_full((*outputs.shape[:2], self.setting.num_classes + 1), NEVER)
        return every.scatter_(2, classes, outputs)[..., :-1].flatten(0, 1)


METHOD = SupSup
