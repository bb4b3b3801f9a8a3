"""SSNeT: a supermask per task, then training of all weights in it, earlier tasks' included; so it forgets.

The ablation of ExSSNeT (`exssnet.py`) that shows what exclusive writes are for. Paper: Yadav, Bansal (arXiv
2210.10209); official code: prateeky2806/exessnet, `--weight-mask-type original`. Spec: card `exssnet`.
"""

from clbench.methods._mask_training import WeightConfig
from clbench.methods.exssnet import ExSSNeT

__all__ = ["METHOD", "SSNeT"]


class SSNeT(ExSSNeT):
    """ExSSNeT whose task writes all of its mask."""

    Config = WeightConfig
    settings = frozenset({"task"})
    exclusive = False


METHOD = SSNeT
