"""Decoding of image files into one uint8 array."""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clbench.errors import InputError

__all__ = ["Canvas", "resize_all"]

EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB"}
# Below this encoded size a thread costs more than it gains: passing the interpreter lock takes longer than decoding.
BYTES_WORTH_A_THREAD = 16_384
Bytes3 = NDArray[np.uint8]


def fit(image: Image.Image, size: int | None) -> Image.Image:
    """Short side to `size` (bicubic, antialiased) and the middle size x size of it, in one resampling."""
    if size is None or image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def resize_all(images: Bytes3, size: int | None) -> Bytes3:
    """`fit` for (N, C, H, W) uint8 images that are arrays already, C 1 or 3."""
    if size is None or images.shape[2:] == (size, size):
        return images
    out = np.empty((*images.shape[:2], size, size), np.uint8)
    for index, image in enumerate(images):
        for channel, plane in enumerate(image):
            out[index, channel] = np.asarray(fit(Image.fromarray(plane), size))
    return out


class Canvas:
    """`total` images to be filled in; their common size is that of the first one, or `size`."""

    def __init__(self, total: int, size: int | None) -> None:
        self.total, self.size = total, size
        self.pixels: Bytes3 | None = None  # (total, 3, H, W)
        self.first = ""

    def decode(self, blob: bytes | Path, where: str) -> Bytes3:
        """One encoded image -> (H, W, 3) uint8. `where` names it in an error."""
        try:
            with Image.open(io.BytesIO(blob) if isinstance(blob, bytes) else blob) as image:
                if image.mode in EIGHT_BIT:
                    return np.asarray(fit(image.convert("RGB"), self.size))
                mode = image.mode
        except Exception as error:  # Pillow's readers raise almost anything on damaged bytes
            raise InputError(
                f"{where} cannot be decoded as an image ({error}); the file is damaged or not an image: get it again"
            ) from error
        raise InputError(f"{where} has pixels of mode {mode}; only 8-bit images are read: convert it first")

    def put(self, start: int, blobs: Sequence[bytes | Path], where: Callable[[int], str]) -> None:
        """Decode `blobs` into the rows from `start` on; `where(i)` names blob i."""
        if not blobs:
            return
        if self.pixels is None:
            self.first = where(0)
            height, width, _ = self.decode(blobs[0], self.first).shape
            self.pixels = np.empty((self.total, 3, height, width), np.uint8)
        pixels = self.pixels

        def fill(span: range) -> None:
            for index in span:
                image = self.decode(blobs[index], where(index))
                if image.shape[:2] != pixels.shape[2:]:
                    raise InputError(
                        f"{where(index)} is {image.shape[0]}x{image.shape[1]} but {self.first} is "
                        f"{pixels.shape[2]}x{pixels.shape[3]}; give one size for all, such as size=64"
                    )
                pixels[start + index] = image.transpose(2, 0, 1)

        sample = blobs[:: max(1, len(blobs) // 16)]
        sizes = [len(blob) if isinstance(blob, bytes) else blob.stat().st_size for blob in sample]
        if sum(sizes) < BYTES_WORTH_A_THREAD * len(sizes):
            fill(range(len(blobs)))
            return
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            spans = (range(at, min(at + 64, len(blobs))) for at in range(0, len(blobs), 64))
            for _ in chain(pool.map(fill, spans)):
                pass

    def finish(self) -> Bytes3:
        """(total, 3, H, W), or (total, 1, H, W) if every image is grey: some formats (WebP) know no grey images, so the
        pixels decide, and the same data gives the same array from any format."""
        if self.pixels is None:
            raise InputError("there is no image in this data set")
        for block in (self.pixels[at : at + 1024] for at in range(0, self.total, 1024)):
            if (block[:, :1] != block[:, 1:]).any():
                return self.pixels
        return self.pixels[:, :1]
