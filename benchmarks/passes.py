"""Images per second of a forward pass by the number of images in it: the figures behind `clbench.backbones.passes`.

python benchmarks/passes.py [BACKBONE] [SIDE]        one thread, CPU time, best of three, interleaved
"""

import sys
import time

import torch

from clbench import backbones
from clbench.backbones.catalogue import EMBEDDED

COUNTS = (8, 16, 32, 64, 128, 256, 512)


def main(name: str = "reduced-resnet18", side: int = 32) -> None:
    torch.set_num_threads(1)
    untrained = {} if name in EMBEDDED else {"pretrained": False}  # speed does not depend on the weights
    network = backbones.build(name, in_shape=(3, side, side), seed=0, options=untrained)
    network.eval().to(memory_format=torch.channels_last)
    images = torch.rand(512, 3, side, side, generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys(COUNTS, 0.0)
    with torch.no_grad():
        for _ in range(3):
            for count in COUNTS:
                begin = time.process_time()
                for part in images.split(count):
                    network(part)
                best[count] = max(best[count], len(images) / (time.process_time() - begin))
    print(f"{name}, {side} px: " + ", ".join(f"{count}: {rate:.0f}" for count, rate in best.items()) + " images/s")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
