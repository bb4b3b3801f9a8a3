"""Compiles the evaluator's kernels for GPUs that need not be there, and prints what came out as JSON.

    TRITON_INTERPRET=0 python tests/evaluator/compile_kernels.py [--all] 9.0 [8.0 ...]

Arguments: compute capabilities; --all: every kind of head and mask in both precisions, instead of one head in bf16.

Launches are those of `head_counts` and `gather_images` on tensors without data, so signatures, tiles and options are a
run's own. Triton compiles to the device's machine code with the assembler that it brings; only loading is left out.
A process of its own, because Triton's interpreter, which the tests use, is chosen when Triton is first imported.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from head_cases import KINDS, MASKS
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from clbench.evaluator import kernels
from clbench.evaluator.heads import GroupCounts
from clbench.methods.base import Head

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROCESSORS = 132  # of an H100 or H200
SHAPES = (  # rows, classes, features: classes walked over by one program, split among several, all in one tile
    (65_536, 1_000, 512),
    (1_000, 1_000, 512),
    (1_000, 10, 160),
)


class Absent:
    """Stands for the driver of a device that is not there."""

    def __init__(self, capability: str) -> None:
        self.target = GPUTarget("cuda", int(capability.replace(".", "")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled(list):
    """The kernels of the launches made inside, none of which is carried out."""

    def __enter__(self) -> "Compiled":
        self.run = run = JITFunction.run

        def compile_only(kernel, *arguments, grid, warmup, **options):
            self.append((kernel.__name__, run(kernel, *arguments, grid=grid, warmup=True, **options)))

        JITFunction.run = compile_only
        return self

    def __exit__(self, *error: object) -> None:
        JITFunction.run = self.run


def facts(name: str, kernel) -> dict:
    """What a device would have to give it, and which instructions it uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as code:
        code.write(kernel.asm["cubin"])
        code.flush()
        asked = [str(TOOLS / "cuobjdump"), "-res-usage", code.name]
        usage = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    ptx = kernel.asm["ptx"]
    products = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.\S+", ptx)
    return {
        "kernel": name,
        "threads": kernel.metadata.num_warps * 32,
        "shared": kernel.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),  # bytes of a thread that its registers did not hold
        "products": sorted(set(products)),
        "tf32": "tf32" in ptx,
        "fused": "fma.rn.f32" in ptx,
    }


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(kind: str, mask: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> list[dict]:
    rows, classes, width = shape
    index = empty(rows, dtype=torch.int64)
    allowed = {"none": None, "shared": empty(classes, dtype=torch.bool), "per row": empty(3, classes, dtype=torch.bool)}
    bias = empty(classes) if kind in ("linear", "cosine") else None
    head = Head(kind, empty(classes, width), bias, empty() if kind == "text" else 10.0)
    out = GroupCounts(*(empty(5, dtype=torch.int64) for _ in range(3)))
    given = {"kind": kind, "mask": mask, "dtype": str(dtype)[6:], "shape": shape}
    with Compiled() as compiled:
        kernels.head_counts(
            empty(rows, width, dtype=dtype), head, index, index, out, allowed[mask],
            index if mask == "per row" else None,
        )  # fmt: skip
    return [given | facts(*each) for each in compiled]


def gather(dtype: torch.dtype, changed: bool) -> list[dict]:
    images, rows = empty(500, 3, 32, 32, dtype=torch.uint8), empty(64, dtype=torch.int64)
    moved = {"top": rows, "left": rows, "flip": empty(64, dtype=torch.bool), "gain": empty(3), "offset": empty(3)}
    with Compiled() as compiled:
        kernels.gather_images(images, rows, (32, 32), dtype=dtype, **(moved if changed else {}))
    return [{"dtype": str(dtype)[6:], "changed": changed} | facts(*each) for each in compiled]


def everything() -> list[dict]:
    """Every kind of head under every mask, in a shape and a precision that change from one to the next."""
    both = (torch.bfloat16, torch.float32)
    made = [each for dtype in both for changed in (False, True) for each in gather(dtype, changed)]
    for place, shape in enumerate(SHAPES):
        for turn, dtype in enumerate(both):
            for number, kind in enumerate(KINDS):
                made += heads(kind, MASKS[(number + place + turn) % len(MASKS)], dtype, shape)
    return made


def main(capabilities: list[str], all_of_them: bool) -> None:
    kernels.refuse_cpu = lambda tensor: None
    kernels.processors = lambda device: PROCESSORS
    found = []
    for capability in capabilities:
        driver.set_active(Absent(capability))
        made = (
            everything()
            if all_of_them
            else gather(torch.bfloat16, True) + heads("linear", "none", torch.bfloat16, SHAPES[0])
        )
        found += [{"capability": capability} | each for each in made]
    print(json.dumps(found))


if __name__ == "__main__":
    main([each for each in sys.argv[1:] if each != "--all"], "--all" in sys.argv)
