"""Features of a frozen backbone, extracted once and kept on disk.

A bank is a folder `<cache>/features/<key>/`. The key is a hash of all that the numbers depend on, so a folder has one
possible content: `features.f32`, (N, D) float32 in row order; `blocks.sha256`, 32 bytes per block, zero until the block
is done; `bank.json`, what the key was made of, for people. Rows are always extracted in the same blocks, so the numbers
do not depend on who asks for what, nor on where an extraction was killed. A block counts only while its bytes match its
digest: whatever a kill, a full disk or a flipped bit leaves behind is extracted again.
"""

import contextlib
import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from clbench.atomic import atomic_write_bytes, explain_os_error
from clbench.backbones.backbone import fingerprint
from clbench.data.cache import cache_folder
from clbench.errors import InputError, RunFailed

__all__ = ["FeatureBank"]

# Images per forward pass on a CPU. Measured with mobilenetv2_100 at 128 px on 2 cores, channels last, images/s:
# 8: 335, 16: 416, 32: 332, 64: 218, 256: 124 (contiguous 16: 292, 256: 52). Larger activations fall out of the cache
# and are mapped and unmapped by the allocator at every layer. A ViT-B does not care.
CPU_CHUNK = 16
DIGEST_BYTES = 32


class FeatureBank:
    """`bank(rows) -> (B, D)`: the features of a frozen backbone for a fixed set of rows.

    backbone: maps (B, C, H, W) to (B, D) and has `num_features`; a copy of it is run, itself it stays as it is.
    read: (B,) int64 rows on `device` -> images on `device`, through the test view.
    rows: (N,) int64 rows of the store, distinct, in any order.
    key_parts: what else the features depend on: view text, store fingerprint, ...
    cache_dir: default `clbench.data.cache.cache_folder()`.
    block: rows that are read, extracted and committed together. precision: `bf16` runs the backbone under autocast.
    """

    def __init__(
        self,
        backbone: nn.Module,
        read: Callable[[Tensor], Tensor],
        rows: Tensor,
        key_parts: Mapping[str, str],
        cache_dir: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        block: int = 256,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        distinct = np.unique(rows.detach().cpu().numpy().astype(np.int64))
        if len(distinct) == 0 or len(distinct) != rows.numel() or distinct[0] < 0:
            raise ValueError(f"a feature bank needs distinct rows of the store; {len(distinct)} of {rows.numel()} are")
        self.rows = torch.from_numpy(distinct)
        self.backbone = backbone
        self.read = read
        self.device = torch.device(device)
        self.num_features = int(backbone.num_features)  # type: ignore[arg-type]  # nn.Module hides the type of attributes
        self.block = block
        self.precision = precision
        self.chunk = CPU_CHUNK if self.device.type == "cpu" else block
        self.description = {
            "backbone": fingerprint(backbone),
            "parts": dict(sorted(key_parts.items())),
            "rows": hashlib.sha256(distinct.astype("<i8").tobytes()).hexdigest(),
            "shape": [len(distinct), self.num_features],
            "block": block,
            "chunk": self.chunk,
            "precision": precision,
            "arithmetic": arithmetic(self.device),
            "torch": torch.__version__,
            "timm": package_version("timm"),
        }
        key = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:32]
        self.folder = (cache_dir or cache_folder()) / "features" / key
        position = torch.full((int(distinct[-1]) + 1,), -1, dtype=torch.int64)
        position[self.rows] = torch.arange(len(distinct))
        self._position = position.to(self.device)
        self._features: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the features on disk."""
        return len(self.rows) * self.num_features * 4

    def extract(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Extract what is not on disk yet, then open the features. One process works on a bank at a time, others wait
        for it. `progress(done, total)` counts rows.

        Raises RunFailed for features that are not finite and for a full disk, InputError for an unwritable cache.
        """
        report = progress or (lambda done, total: None)
        total = len(self.rows)
        path = self.folder / "features.f32"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / "lock"), BlockFile(self.folder, total, self.num_features * 4, self.block) as file:
                todo = [index for index in range(file.num_blocks) if not file.is_done(index)]
                done = total - sum(file.length(index) for index in todo)
                report(done, total)
                if todo:
                    text = json.dumps(self.description, indent=1, sort_keys=True) + "\n"
                    atomic_write_bytes(self.folder / "bank.json", text.encode())
                    for index, content in zip(todo, self._compute(todo), strict=True):
                        file.write(index, content)
                        done += file.length(index)
                        report(done, total)
                    file.sync()
            # Not shared: a stray write in memory does not reach the file.
            data = torch.from_file(str(path), shared=False, size=total * self.num_features, dtype=torch.float32)
        except OSError as error:
            raise explain_os_error(error, path, f"keep {self.num_bytes / 1e6:.0f} MB of features in") from error
        self._features = data.view(total, self.num_features).to(self.device)

    def _compute(self, blocks: list[int]) -> Iterator[bytes]:
        """Features of each block, as bytes. Convolutions run channels last, which is faster on CPU and GPU alike."""
        net = copy.deepcopy(self.backbone).eval().to(self.device).to(memory_format=torch.channels_last)
        for index in blocks:
            rows = self.rows[index * self.block : (index + 1) * self.block]
            with torch.no_grad():  # not inference mode: a view may keep constants that training reads later
                images = self.read(rows.to(self.device)).contiguous(memory_format=torch.channels_last)
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            ):
                parts = [net(images[start : start + self.chunk]).float() for start in range(0, len(rows), self.chunk)]
                features = torch.cat(parts).cpu()
            if features.shape != (len(rows), self.num_features):
                raise ValueError(f"{len(rows)} images gave {tuple(features.shape)}, not (B, {self.num_features})")
            if not bool(torch.isfinite(features).all()):
                raise RunFailed(
                    f"features of the images in rows {int(rows[0])} to {int(rows[-1])} are not finite: check the "
                    f"weights and the test view"
                )
            yield features.numpy().tobytes()

    def __call__(self, rows: Tensor, domain: Tensor | None = None) -> Tensor:
        """rows: (B,) int64 on `device` -> (B, D) float32 on `device`, without a host read.

        Raises InputError for a domain: the features are those of the images as they are stored.
        """
        if domain is not None:
            raise InputError(
                "features of a frozen backbone are kept for the stored images only, and this scenario changes pixels "
                "by domain: choose a method that reads images, or a scenario without domains"
            )
        if self._features is None:
            raise RuntimeError("call extract() before asking a feature bank for features")
        try:
            return self._features.index_select(0, self._position.index_select(0, rows))
        except (IndexError, RuntimeError) as error:
            raise IndexError(f"some rows are not among the {len(self.rows)} of this feature bank") from error


class BlockFile:
    """`features.f32` and `blocks.sha256` of a bank: fixed blocks of rows, each committed by the digest of its bytes."""

    def __init__(self, folder: Path, num_rows: int, row_bytes: int, block: int) -> None:
        self.num_rows, self.row_bytes, self.block = num_rows, row_bytes, block
        self.num_blocks = -(-num_rows // block)
        with contextlib.ExitStack() as opened:
            self.data = opened.enter_context(sized_file(folder / "features.f32", num_rows * row_bytes))
            self.marks = opened.enter_context(sized_file(folder / "blocks.sha256", self.num_blocks * DIGEST_BYTES))
            self.opened = opened.pop_all()

    def __enter__(self) -> "BlockFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.close()

    def length(self, index: int) -> int:
        """Rows in a block; the last may be short."""
        return min(self.block, self.num_rows - index * self.block)

    def is_done(self, index: int) -> bool:
        mark = os.pread(self.marks, DIGEST_BYTES, index * DIGEST_BYTES)
        if not any(mark):
            return False
        content = os.pread(self.data, self.length(index) * self.row_bytes, index * self.block * self.row_bytes)
        return hashlib.sha256(content).digest() == mark

    def write(self, index: int, content: bytes) -> None:
        write_at(self.data, content, index * self.block * self.row_bytes)
        write_at(self.marks, hashlib.sha256(content).digest(), index * DIGEST_BYTES)

    def sync(self) -> None:
        os.fsync(self.data)
        os.fsync(self.marks)


@contextlib.contextmanager
def sized_file(path: Path, size: int) -> Iterator[int]:
    """A handle for reading and writing `size` bytes. The space is reserved, so that a full disk shows at once."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(handle).st_size != size:
            os.ftruncate(handle, size)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(handle, 0, size)
        yield handle
    finally:
        os.close(handle)


def write_at(handle: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(handle, content, offset)
        content, offset = content[written:], offset + written


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process, however it ends. Where there is no flock, two processes only
    do the same work twice: a block of mixed bytes does not match its digest."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(ImportError):
            import fcntl

            while True:  # not a blocking call, so that an interrupt comes through
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def arithmetic(device: torch.device) -> str:
    """What computes: features begun on one kind are not continued on another."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
