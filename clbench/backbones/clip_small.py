"""clip-small: a CLIP of 4 million parameters for 64 px images, as a custom configuration of open_clip.

Image tower: a residual network with group norm (no batch norm: averaging weights and distilling at batch size 1 need
none of its statistics), known to timm as `clbench_convnet_small`. Text tower: open_clip's transformer over a
vocabulary of whole words (`assets/clip-small.txt`), since open_clip's own 49,408 pieces would take 19 MB.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["CONFIG", "NAME", "WEIGHTS", "WordTokenizer", "clbench_convnet_small", "vocabulary_digest", "words"]

NAME = "clip-small"
ASSETS = Path(__file__).parent / "assets"
CONFIG = ASSETS / f"{NAME}.json"
WEIGHTS = ASSETS / f"{NAME}.safetensors"

WIDTHS = (64, 128, 256)  # two blocks each, at 8 x 8, 4 x 4 and 2 x 2 of a 64 px image
STEM = 32
GROUPS = 8


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm, added to the shortcut; ReLU after the sum."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class SmallConvNet(nn.Module):
    """(B, 3, H, W) images in [0, 1], not normalised -> (B, 256); the interface that open_clip asks of timm's models."""

    num_features = WIDTHS[-1]

    def __init__(self) -> None:
        super().__init__()
        self.default_cfg: dict[str, Any] = {"input_size": (3, 64, 64), "pool_size": (2, 2)}
        self.grad_checkpointing = False
        self.stem1 = nn.Conv2d(3, STEM, 6, 4, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, STEM)
        self.stem2 = nn.Conv2d(STEM, WIDTHS[0], 3, 2, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, WIDTHS[0])
        blocks: list[nn.Module] = []
        inputs = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            blocks += [Residual(inputs, width, 2 if stage else 1), Residual(width, width, 1)]
            inputs = width
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Residual):
                nn.init.zeros_(module.norm2.weight)  # each block starts as its shortcut

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        if num_classes or global_pool != "avg":
            raise ValueError("clbench_convnet_small has average pooling and no classifier")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem1((x - 0.45) * 4)))  # about zero mean and unit variance for photographs
        x = F.relu(self.norm2(self.stem2(x)))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x.mean((2, 3))


@register_model
def clbench_convnet_small(pretrained: bool = False, **kwargs: Any) -> SmallConvNet:
    """What `timm.create_model` calls; open_clip passes nothing that changes the network."""
    return SmallConvNet()


@cache
def words() -> tuple[str, ...]:
    """The shipped vocabulary."""
    return tuple((ASSETS / f"{NAME}.txt").read_text(encoding="utf-8").split())


def vocabulary_digest() -> str:
    """sha256 (hex) of the shipped vocabulary, which weights files carry as `vocabulary`."""
    return hashlib.sha256(" ".join(words()).encode()).hexdigest()


class WordTokenizer:
    """Texts -> (N, context_length) int64: start, one id per word, digit or sign, end, zeros.

    Words are lower case letters; one that the vocabulary does not hold is cut into the longest pieces that it does
    hold, down to single characters, from left to right; what is no printable ASCII is one id. The end has the highest
    id, which is where open_clip's text tower reads its feature.
    """

    characters = tuple(chr(code) for code in range(33, 127))

    def __init__(self, vocabulary: Sequence[str], context_length: int = 64, vocab_size: int = 1024) -> None:
        entries = (*self.characters, *(word for word in vocabulary if len(word) > 1))
        if len(entries) + 4 > vocab_size:
            raise ValueError(f"{len(entries)} words and characters do not fit a vocabulary of {vocab_size}")
        self.ids = {entry: number + 2 for number, entry in enumerate(entries)}  # 0: nothing, 1: unknown character
        self.start, self.end = vocab_size - 2, vocab_size - 1
        self.context_length = context_length
        self.longest = max(map(len, entries))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""
        return [number for part in re.findall(r"[a-z]+|[^\sa-z]", text.lower()) for number in self.pieces(part)]

    def pieces(self, word: str) -> list[int]:
        out, at = [], 0
        while at < len(word):
            for end in range(min(len(word), at + self.longest), at, -1):
                piece = word[at:end]
                # inside a longer word only pieces of three letters or more mean anything
                if piece in self.ids and (len(piece) > 2 or len(piece) == 1 or len(word) == len(piece)):
                    out.append(self.ids[piece])
                    at = end
                    break
            else:
                out.append(1)
                at += 1
        return out

    def __call__(self, texts: Sequence[str]) -> Tensor:
        result = torch.zeros((len(texts), self.context_length), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids = [self.start, *self.encode(text)[: self.context_length - 2], self.end]
            result[row, : len(ids)] = torch.tensor(ids)
        return result
