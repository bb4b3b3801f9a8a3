"""The feature bank: same numbers whoever asks, after any kill, and never wrong ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clbench.backbones import FeatureBank, build
from clbench.errors import InputError, RunFailed

PARTS = {"view": "", "store": "abc"}
BLOCK, COUNT = 8, 60
BYTES = BLOCK * 160 * 4


class Images:
    """64 images by row; remembers which rows were read."""

    def __init__(self) -> None:
        self.images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.read: list[list[int]] = []

    def __call__(self, rows: Tensor) -> Tensor:
        self.read.append(rows.tolist())
        return self.images[rows]


def network(seed: int = 0) -> nn.Module:
    return build("reduced-resnet18", in_shape=(3, 8, 8), seed=seed)


def rows() -> Tensor:
    return torch.arange(2, 2 + COUNT)


def bank(cache: Path, images: Images | None = None, **changes: object) -> FeatureBank:
    given: dict[str, object] = {"backbone": network(), "rows": rows(), "key_parts": PARTS, "block": BLOCK, **changes}
    return FeatureBank(read=images or Images(), cache_dir=cache, **given)  # type: ignore[arg-type]  # the test's changes


def test_features_are_the_backbones(tmp_path: Path) -> None:
    images, net = Images(), network()
    made = bank(tmp_path, images, backbone=net, rows=rows().flip(0))
    seen: list[tuple[int, int]] = []
    made.extract(lambda done, total: seen.append((done, total)))
    assert seen == [(done, COUNT) for done in [*range(0, COUNT, BLOCK), COUNT]]
    assert images.read == [list(range(start, min(start + BLOCK, 62))) for start in range(2, 62, BLOCK)]
    asked = torch.tensor([61, 2, 30, 2])
    net.eval()
    with torch.no_grad():
        expected = net(images.images[asked])
    features = made(asked)
    assert features.dtype == torch.float32
    assert made.num_features == 160
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert made.num_bytes == (made.folder / "features.f32").stat().st_size
    assert json.loads((made.folder / "bank.json").read_text())["parts"] == PARTS


def test_the_backbone_is_left_as_it_was(tmp_path: Path) -> None:
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    bank(tmp_path, backbone=net).extract()
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.net.conv1.weight.is_contiguous()


def test_a_second_bank_reads_no_image(tmp_path: Path) -> None:
    first, images = bank(tmp_path), Images()
    first.extract()
    second = bank(tmp_path, images)
    seen: list[tuple[int, int]] = []
    second.extract(lambda done, total: seen.append((done, total)))
    assert images.read == []
    assert seen == [(COUNT, COUNT)]
    assert torch.equal(first(rows()), second(rows()))


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": network(1)}, {"rows": rows()[1:]}, {"key_parts": {"view": "flip", "store": "abc"}}, {"block": 16},
        {"precision": "bf16"},
    ],
)  # fmt: skip
def test_anything_else_is_another_bank(tmp_path: Path, change: dict[str, object]) -> None:
    assert bank(tmp_path, **change).folder != bank(tmp_path).folder


def test_a_trained_backbone_is_another_backbone(tmp_path: Path) -> None:
    net = network()
    before = bank(tmp_path, backbone=net).folder
    with torch.no_grad():
        net.net.bn1.weight[0] += 1
    assert bank(tmp_path, backbone=net).folder != before


CHILD = """
import sys, time, torch
sys.path.insert(0, {here!r})
from pathlib import Path
from test_features import Images, bank
torch.set_num_threads(1)

class Slow(Images):
    def __call__(self, rows):
        time.sleep({sleep})
        return super().__call__(rows)

images = Slow()
made = bank(Path({cache!r}), images)
print("ready", flush=True)
sys.stdin.readline()
made.extract()
print(len(images.read), flush=True)
"""


def start_child(cache: Path, sleep: float) -> "subprocess.Popen[str]":
    code = CHILD.format(here=str(Path(__file__).parent), cache=str(cache), sleep=sleep)
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def go(child: "subprocess.Popen[str]") -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def done_blocks(folder: Path) -> int:
    path = folder / "blocks.sha256"
    marks = path.read_bytes() if path.exists() else b""
    return sum(any(marks[start : start + 32]) for start in range(0, len(marks), 32))


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole = bank(tmp_path / "whole")
    whole.extract()
    folder = bank(tmp_path / "killed").folder
    child = start_child(tmp_path / "killed", sleep=0.05)
    go(child)
    deadline = time.monotonic() + 30
    while done_blocks(folder) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = done_blocks(folder)
    assert 3 <= left < 8
    images = Images()
    resumed = bank(tmp_path / "killed", images)
    resumed.extract()
    assert len(images.read) == 8 - left
    assert torch.equal(resumed(rows()), whole(rows()))
    assert (resumed.folder / "features.f32").read_bytes() == (whole.folder / "features.f32").read_bytes()


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    children = [start_child(tmp_path, sleep=0.02) for _ in range(2)]
    for child in children:
        go(child)
    reads = [int(child.communicate(timeout=60)[0]) for child in children]
    assert sorted(reads) == [0, 8]  # one waits for the other
    here, fresh = bank(tmp_path), bank(tmp_path / "fresh")
    here.extract()
    fresh.extract()
    assert torch.equal(here(rows()), fresh(rows()))


def test_damage_is_found_and_mended(tmp_path: Path) -> None:
    made = bank(tmp_path)
    made.extract()
    path = made.folder / "features.f32"
    whole = path.read_bytes()

    def blocks_read(content: bytes) -> int:
        path.write_bytes(content)
        images = Images()
        bank(tmp_path, images).extract()
        assert path.read_bytes() == whole
        return len(images.read)

    flipped = bytearray(whole)
    flipped[2 * BYTES + 5] ^= 1
    assert blocks_read(bytes(flipped)) == 1
    assert blocks_read(whole[: 5 * BYTES + 100]) == 3  # the sixth block is cut, two are gone
    assert blocks_read(b"") == 8
    marks = made.folder / "blocks.sha256"
    marks.write_bytes(marks.read_bytes()[:40])
    assert blocks_read(whole) == 7
    marks.write_bytes(os.urandom(256))
    assert blocks_read(whole) == 8


def test_questions_it_does_not_answer(tmp_path: Path) -> None:
    made = bank(tmp_path)
    with pytest.raises(RuntimeError, match="extract"):
        made(rows())
    made.extract()
    with pytest.raises(InputError, match="by domain"):
        made(rows(), torch.zeros(COUNT, dtype=torch.int64))
    for outside in (0, 62, 900):
        with pytest.raises(IndexError, match="not among the 60"):
            made(torch.tensor([3, outside]))
    for wrong in (torch.tensor([1, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([-1, 2])):
        with pytest.raises(ValueError, match="distinct rows"):
            bank(tmp_path, rows=wrong)


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    images = Images()
    images.images[30] = torch.nan
    broken = bank(tmp_path / "nan", images)
    with pytest.raises(RunFailed, match="rows 26 to 33 are not finite"):
        broken.extract()
    assert done_blocks(broken.folder) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep 0 MB of features in"):
        bank(tmp_path / "file").extract()


def test_full_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    images = Images()
    with pytest.raises(RunFailed, match="disk is full"):
        bank(tmp_path, images).extract()
    assert images.read == []
    monkeypatch.undo()
    made = bank(tmp_path)
    made.extract()
    assert made(rows()).shape == (COUNT, 160)


def test_bf16_is_close(tmp_path: Path) -> None:
    exact, rough = bank(tmp_path), bank(tmp_path, precision="bf16")
    for each in (exact, rough):
        each.extract()
    difference = (exact(rows()) - rough(rows())).norm() / exact(rows()).norm()
    assert 0 < float(difference) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    images = Images()
    images.images = images.images.cuda()
    on_gpu, on_cpu = bank(tmp_path, images, device="cuda"), bank(tmp_path)
    for each in (on_gpu, on_cpu):
        each.extract()
    assert on_gpu.folder != on_cpu.folder
    torch.testing.assert_close(on_gpu(rows().cuda()).cpu(), on_cpu(rows()), rtol=1e-2, atol=1e-3)
