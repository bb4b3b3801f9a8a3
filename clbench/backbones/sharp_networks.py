"""The networks of SHARP in stages: early convolutions, late convolutions, linear layers (sharp card, section 1).

They are plain networks that anything can train; what is special is that they can be entered behind the early
convolutions, where SHARP stores activations, and that they tell the activity of every unit. A unit is a channel of a
convolution or an output of a linear layer.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError

__all__ = ["StagedNetwork", "mnistlike", "vgg_small"]

Shape = tuple[int, int, int]
Convolution = tuple[int, bool]  # output channels, and whether 2x2 max-pooling follows


class UnitLayer(Protocol):
    """A convolution or a linear layer: `weight` (units, sources, ...), `bias` (units,)."""

    weight: nn.Parameter
    bias: nn.Parameter

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...


class StagedNetwork(nn.Module):
    """3x3 convolutions (padding 1) and linear layers, all with bias and a ReLU behind them; D = the last layer's width.

    layers: in order; the first `num_early` are the early block. pooled: which are followed by 2x2 max-pooling.
    inputs_per_unit: for each layer the inputs that one unit of the layer below feeds: pixels of a channel for the first
    linear layer (channel c feeds inputs c * m to c * m + m - 1), else 1.
    activation_shape: (C, H, W) behind the early block.
    Initial weights: Kaiming normal (fan in, ReLU); biases 0.
    """

    def __init__(
        self, in_shape: Shape, early: Sequence[Convolution], late: Sequence[Convolution], widths: Sequence[int]
    ) -> None:
        super().__init__()
        channels, height, width = in_shape
        self.num_early = len(early)
        self.pooled = [pool for _, pool in (*early, *late)] + [False] * len(widths)
        self.layers = nn.ModuleList()
        self.inputs_per_unit = [1] * len(self.pooled)
        self.activation_shape = in_shape
        for out, pool in (*early, *late):
            self.layers.append(nn.Conv2d(channels, out, 3, padding=1))
            channels = out
            if pool:
                height, width = height // 2, width // 2
            if len(self.layers) == self.num_early:
                self.activation_shape = (channels, height, width)
        if min(height, width) < 1:
            side = 2 ** sum(self.pooled)
            raise InputError(
                f"this network halves its images {sum(self.pooled)} times and needs at least {side} x {side} px, not "
                f"{in_shape[1]} x {in_shape[2]}: resize in the view, or choose another backbone"
            )
        self.inputs_per_unit[len(self.layers)] = height * width
        inputs = channels * height * width
        for out in widths:
            self.layers.append(nn.Linear(inputs, out))
            inputs = out
        for layer in self.unit_layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    @property
    def unit_layers(self) -> list[UnitLayer]:
        """The layers, with the type of what they all have."""
        return list(self.layers)  # type: ignore[arg-type]  # nn.ModuleList forgets what it holds

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), not negative."""
        return self.run(images)

    def early(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, *activation_shape): what is stored."""
        return self.run(images, last=self.num_early)

    def from_early(self, activation: Tensor) -> Tensor:
        """(B, *activation_shape) -> (B, D)."""
        return self.run(activation, first=self.num_early)

    def activity(self, images: Tensor) -> list[Tensor]:
        """Sum over batch and space of every unit behind its ReLU, ahead of pooling: one (units,) float64 per layer."""
        outputs: list[Tensor] = []
        self.run(images, outputs=outputs)
        return [out.double().sum(dim=[d for d in range(out.ndim) if d != 1]) for out in outputs]

    def run(self, x: Tensor, first: int = 0, last: int | None = None, outputs: list[Tensor] | None = None) -> Tensor:
        """Through the layers from `first` to ahead of `last`; appends what leaves each ReLU to `outputs`."""
        for index in range(first, len(self.layers) if last is None else last):
            layer = self.layers[index]
            if isinstance(layer, nn.Linear) and x.ndim > 2:
                x = x.flatten(1)
            x = F.relu(layer(x))
            if outputs is not None:
                outputs.append(x)
            if self.pooled[index]:
                x = F.max_pool2d(x, 2)
        return x


def mnistlike(in_shape: Shape, width: int) -> StagedNetwork:
    """MNISTLIKE: two convolutions of 16 channels, each pooled; two linear layers of `width` (500)."""
    return StagedNetwork(in_shape, [(16, True), (16, True)], [], [width, width])


def vgg_small(in_shape: Shape, width: int) -> StagedNetwork:
    """VGG_Small: 64, 64 pooled, 64, 64 pooled; late 128, 128, 128 pooled; two linear layers of `width` (1024; 2048 in
    VGG_Small_Double)."""
    early = [(64, False), (64, True), (64, False), (64, True)]
    return StagedNetwork(in_shape, early, [(128, False), (128, False), (128, True)], [width, width])
