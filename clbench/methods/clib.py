"""CLIB: learn from an importance-balanced memory alone, at a learning rate chosen by a t-test.

Koh et al., ICLR 2022 (i-Blurry); rules from the `hle` card (1.4, 1.5, 2, 5.6) and the `si_blurry` card (section 2), in
the form of methods/clib.py of naver-ai/i-Blurry and KHU-AGI/Si-Blurry. A sample that arrives goes into the memory, and
every update trains on a batch drawn from the memory; the stream itself is never trained on.

Differences from the official code:
- The head has all classes from the start; unseen ones are left out of the softmax. Biases are not drawn anew as a class
  appears, and Adam's step count is one for all rows.
- All samples of a stream batch are stored before its first update. i-Blurry stores one, updates, stores the next.
- i-Blurry notes loss changes of a turn in which no exemplar stayed as NaN, which stops the t-test for good; here they
  count as 0. The t-test itself is computed on the device (`_adaptive_rate`).
- Of classes of one size the one met first loses an exemplar, of equally important exemplars the oldest one (i-Blurry;
  Si-Blurry's own copy takes the lowest slot).
- If only the head is trained (`train=head`, as in Si-Blurry), features are kept and images are not augmented.
"""

from __future__ import annotations

from dataclasses import dataclass

from clbench.methods._importance_replay import ImportanceConfig, ImportanceReplay, Prepared
from clbench.methods.base import hp
from clbench.stream.types import Batch


@dataclass(frozen=True)
class CLIBConfig(ImportanceConfig):
    """Hyperparameters of CLIB."""

    replay_batch_size: int = hp(
        16, "exemplars drawn per update", low=1, high=100_000, unit="exemplars", source="hle card, section 2: batch 16"
    )


class CLIB(ImportanceReplay):
    """Store the stream, train on the memory."""

    Config = CLIBConfig
    graphable = True
    name = "clib"

    def draw(self, batch: Batch) -> Prepared:
        """Store new samples, then draw from the memory, which holds them now."""
        step, rng = batch.at.step, self.setting.rng
        if self.remembers(batch):
            self.memory.add(batch.rows, batch.targets, batch.domain)
        drawn = self.memory.sample(self.config.replay_batch_size, rng("replay", step))
        self.memory.mark(drawn.slots)
        images = self.setting.read(drawn.rows, drawn.domain, batch.phase.view, rng("replay-view", step))
        return self.prepared(images, drawn.targets, batch)


METHOD = CLIB
