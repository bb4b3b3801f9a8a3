"""DER: dark experience replay, which keeps the past by stored logits alone. It is `derpp` with beta = 0.

Buzzega et al. 2020, card `online_baselines`, section 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass

from clbench.methods.base import hp
from clbench.methods.derpp import DERPP, DERPPConfig


@dataclass(frozen=True)
class DERConfig(DERPPConfig):
    """Hyperparameters of DER."""

    beta: float = hp(0.0, "weight of a cross entropy on a second replay batch; 0 is DER", low=0.0, high=100.0)


class DER(DERPP):
    """DER++ without labels."""

    Config = DERConfig
    aliases = ("dark-experience-replay",)
    graphable = True


METHOD = DER
