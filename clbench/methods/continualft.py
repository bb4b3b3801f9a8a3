"""Continual fine-tuning of CLIP: cross entropy on each task as it comes, both towers, nothing kept.

The lower row of the MTIL table (mtil card, section 2, baselines): the training recipe that all its methods share, and
the loss of the task alone. Same as the official code but for the order of batches.
"""

from clbench.methods._clip import ClipConfig, ClipMethod


class ContinualFT(ClipMethod):
    """One phase per task."""

    Config = ClipConfig
    settings = frozenset({"class", "task"})
    aliases = ("continual-ft", "clipft", "clip-finetune")


METHOD = ContinualFT
