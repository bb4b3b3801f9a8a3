"""The fused kernels as machine code of GPUs that need not be here: they compile, fit, and multiply as said."""

import json
import os
import platform
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from head_cases import KINDS, MASKS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton brings its assembler on Linux x86-64 only"
)
SHARED = {"8.0": 166_912, "8.9": 101_376, "9.0": 232_448, "10.0": 232_448, "12.0": 101_376}  # bytes of a program
TENSOR_CORES = re.compile(r"\.f32\.bf16\.bf16|^tcgen05\.mma.*\.kind::f16")  # Blackwell's says the rest at run time
REGISTERS, MOST = 65_536, 255  # of a processor, of a thread
# bytes of a thread set aside behind the products: some values, not a tile of masks. Tiles are not chosen for Blackwell
STACK = {"8.0": 640, "8.9": 640, "9.0": 640, "10.0": 1280, "12.0": 640}


def compiled(cache: Path, *arguments: str) -> list[dict]:
    worker = Path(__file__).with_name("compile_kernels.py")
    set_up = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    ended = subprocess.run([sys.executable, str(worker), *arguments], capture_output=True, text=True, env=set_up)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert not ended.stderr, "a warning would reach the user's screen"
    return json.loads(ended.stdout)


def assert_sound(kernels: list[dict], capability: str) -> None:
    for each in kernels:
        assert each["stack"] <= STACK[capability], each
        assert each["shared"] <= SHARED[capability], each
        assert each["registers"] <= MOST, each
        assert each["registers"] * each["threads"] <= REGISTERS, each
        assert not each["tf32"], each
        multiplies = each["kernel"] in ("head_kernel", "rank_kernel")
        if multiplies and each["dtype"] == "bfloat16":  # on tensor cores, summed up in fp32
            assert each["products"], each
            assert all(TENSOR_CORES.search(name) for name in each["products"]), each
        else:  # fp32 is multiplied as fp32
            assert not each["products"], each
        if each["kernel"] == "gather_kernel":
            assert not each["fused"], "gain and offset must be rounded apart, or images differ from plain PyTorch's"


def assert_two_share_a_processor(kernels: list[dict]) -> None:
    """Of the head kernel in bf16 on Hopper: one program multiplies while the other looks for its largest logit."""
    wide = [each for each in kernels if each["kernel"] == "head_kernel" and each["dtype"] == "bfloat16"]
    assert wide
    for each in wide:
        assert all(name.startswith("wgmma") for name in each["products"]), each
        assert 2 * each["registers"] * each["threads"] <= REGISTERS, each
        assert 2 * each["shared"] <= SHARED["9.0"], each


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    kernels = compiled(tmp_path, "9.0")
    assert {each["kernel"] for each in kernels} == {"gather_kernel", "head_kernel", "rank_kernel"}
    assert_sound(kernels, "9.0")
    assert_two_share_a_processor(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_compile_for(tmp_path: Path, capability: str) -> None:
    kernels = compiled(tmp_path, "--all", capability)
    names = {"gather_kernel", "head_kernel", "join_kernel", "rank_kernel", "squares_kernel"}
    assert {each["kernel"] for each in kernels} == names
    heads = {(each["kind"], each["mask"]) for each in kernels if each["kernel"] == "head_kernel"}
    assert heads == set(product(KINDS, MASKS))
    assert_sound(kernels, capability)
    if capability == "9.0":
        assert_two_share_a_processor(kernels)
