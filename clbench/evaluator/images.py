"""Rows to float images in one pass: which views the gather kernel can do, and a reader that uses it for them.

A view can be done if it is at most one crop (`pad_crop`, `random_crop`, `center_crop`), then at most one `flip`, then
at most one `normalize` or `scale`: what training and testing on small images mostly use. The fp32 result is the view's
own to the bit; its memory is channels-last.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clbench.data import views
from clbench.data.reader import Reader
from clbench.data.views import View

__all__ = ["FusedReader", "FusedView", "fuse", "gather_images_reference"]


class FusedView(NamedTuple):
    """A view as arguments of the gather. crop, flip: the operation or None. size: (h, w) that comes out. gain, offset:
    (C,) float32 on the device (pixel value 0..255 -> output), None: divide by 255."""

    view: View
    crop: views.Operation | None
    flip: views.Flip | None
    size: tuple[int, int]
    gain: Tensor | None
    offset: Tensor | None

    def arguments(self, count: int, shape: tuple[int, int, int], device: torch.device, rng: Any) -> dict[str, Any]:
        """What one batch is cut and mirrored by: the same draws, in the same places, as `View.__call__` makes."""
        given: dict[str, Any] = {"gain": self.gain, "offset": self.offset, "fill": 0.0}
        if self.view.draws and rng is None:
            raise ValueError(f"view {self.view.text!r} is random and needs a generator: pass rng")
        u = torch.rand((count, self.view.draws), generator=rng, device=device) if self.view.draws else None
        _, height, width = shape
        if isinstance(self.crop, views.PadCrop):
            at = views.scaled(_drawn(u)[:, :2], 2 * self.crop.padding + 1) - self.crop.padding
            given |= {"top": at[:, 0].contiguous(), "left": at[:, 1].contiguous(), "fill": float(int(self.crop.fill))}
        elif isinstance(self.crop, views.RandomCrop):
            given["top"] = views.scaled(_drawn(u)[:, 0], height - self.size[0] + 1)
            given["left"] = views.scaled(_drawn(u)[:, 1], width - self.size[1] + 1)
        elif self.crop is not None:
            top, left = (round((side - out) / 2) for side, out in zip((height, width), self.size, strict=True))
            given["top"] = torch.full((count,), top, dtype=torch.int64, device=device)
            given["left"] = torch.full((count,), left, dtype=torch.int64, device=device)
        if self.flip is not None:
            given["flip"] = _drawn(u)[:, -1] < self.flip.p
        return given


def fuse(view: View, shape: tuple[int, int, int], device: torch.device) -> FusedView | None:
    """`view` on stored images of (C, H, W) as arguments of the gather, or None if it does more than that."""
    rest = list(view.operations)
    crop = rest.pop(0) if rest and isinstance(rest[0], views.PadCrop | views.RandomCrop | views.CenterCrop) else None
    flip = rest.pop(0) if rest and isinstance(rest[0], views.Flip) else None
    affine = rest.pop(0) if rest and isinstance(rest[0], views.Affine) else None
    assert affine is None or isinstance(affine, views.Affine)
    if rest:
        return None
    channels, height, width = view.output_shape(shape)
    gain = offset = None
    if affine is not None:
        # the numbers of `Affine.__call__` for bytes
        gain, offset = (torch.tensor(part, dtype=torch.float64) for part in affine.constants())
        if len(gain) not in (1, shape[0]) or channels != shape[0]:
            return None
        gain, offset = ((x.to(torch.float32)).expand(shape[0]).contiguous().to(device) for x in (gain / 255, offset))
    return FusedView(view, crop, flip, (height, width), gain, offset)  # type: ignore[arg-type]  # isinstance above


def gather_images_reference(
    images: Tensor,
    rows: Tensor,
    size: tuple[int, int],
    *,
    top: Tensor | None = None,
    left: Tensor | None = None,
    flip: Tensor | None = None,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    fill: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(N, C, H, W) uint8 at `rows` (B,) int64 -> (B, C, h, w) `dtype`, channels last.

    top, left: (B,) int64, where each window begins, in or outside of the image; None: 0. Pixels outside are `fill`.
    flip: (B,) bool, mirror the window left-right. gain, offset: (C,) float32, value * gain + offset; None: value / 255.

    Raises ValueError if only one of top and left, or of gain and offset, is given.
    """
    refuse_halves(top, left, gain, offset)
    channels, height, width = images.shape[1:]
    y = torch.arange(size[0], device=images.device).expand(len(rows), -1)
    x = torch.arange(size[1], device=images.device).expand(len(rows), -1)
    if flip is not None:
        x = torch.where(flip[:, None], size[1] - 1 - x, x)
    if top is not None and left is not None:
        y, x = y + top[:, None], x + left[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    place = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
    pixels = images[rows].flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, channels, -1))
    value = torch.where(inside[:, None], pixels.view(len(rows), channels, *size).to(torch.float32), fill)
    if gain is not None and offset is not None:
        value = value.mul(gain[:, None, None]).add_(offset[:, None, None])
    else:
        value = value / 255
    return value.to(dtype).contiguous(memory_format=torch.channels_last)


class FusedReader(Reader):
    """A reader that hands the views it can to `gather`; domains and other views go the ordinary way."""

    def __init__(self, *arguments: Any, gather: Callable[..., Tensor], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.gather = gather
        shape, device = self.store.image_shape, self.store.device
        self.fused = {name: fuse(view, shape, device) for name, view in self.views.items()}

    def __call__(
        self,
        rows: Tensor,
        domain: Tensor | None = None,
        view: str = "train",
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """As `Reader.__call__`."""
        fused = self.fused.get(view)
        if fused is None or (domain is not None and self.domains is not None):
            return super().__call__(rows, domain, view, rng)
        images = self.store.images
        given = fused.arguments(len(rows), self.store.image_shape, images.device, rng)
        return self.gather(images, rows, fused.size, **given)


def refuse_halves(top: Tensor | None, left: Tensor | None, gain: Tensor | None, offset: Tensor | None) -> None:
    """Raise ValueError where one of two that belong together is missing."""
    if (top is None) != (left is None):
        raise ValueError("top and left belong together: give both or none")
    if (gain is None) != (offset is None):
        raise ValueError("gain and offset belong together: give both or none")


def _drawn(u: Tensor | None) -> Tensor:
    assert u is not None
    return u
