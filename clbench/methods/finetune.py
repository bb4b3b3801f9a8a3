"""Sequential fine-tuning: train on each task as it comes, keep nothing. The lower bound."""

from __future__ import annotations

from clbench.methods._softmax import SgdConfig, SoftmaxMethod


class Finetune(SoftmaxMethod):
    """One phase per task, cross entropy on the stream."""

    Config = SgdConfig
    aliases = ("seqft", "naive", "sgd")
    graphable = True


METHOD = Finetune
