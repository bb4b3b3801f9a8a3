"""What is installed, which device would be used, which data is found, and what to do about what is missing.

Every check answers even if the thing it looks at is broken: that is when one asks.
"""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["Finding", "examine"]

ENGINE = ("torch", "numpy", "pandas", "pyarrow", "timm", "pydantic")  # what a bare GPU node needs
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "open_clip_torch": "open_clip"}  # where the names differ
SLOW_IMPORTS = ("mlflow", "open_clip_torch")  # seconds each, and used by few runs: their versions are enough
GIB = 2**30

State = Literal["ok", "note", "missing"]


class Finding(NamedTuple):
    """One line of the report. state: `ok`, `note` (works without), or `missing` (something will fail).

    advice: what to do, empty if nothing.
    """

    topic: str
    state: State
    found: str
    advice: str = ""


def examine(data: Sequence[Path] = (), out: Path = Path("results/runs")) -> Iterator[Finding]:
    """Look at everything, in the order a reader wants it. `data` and `out` are those of `clbench run`."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "clbench": _program,
        "packages": _packages,
        "device": _device,
        "processor": _processor,
        "folders": lambda: _folders(out),
        "data": lambda: _data(data),
    }
    for topic, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # a broken installation can fail in any way, and the report must go on
            yield Finding(topic, "missing", _sentence(error), "see the lines above, or reinstall clbench")


def _program() -> Iterator[Finding]:
    import clbench

    yield Finding("clbench", "ok", f"{clbench.__version__} at {Path(__file__).parent}")
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    declared = _declared()
    for name in declared.get("", ENGINE):
        if not _installed(name):
            state: State = "missing" if name in ENGINE else "note"
            yield Finding(name, state, "not installed", f"pip install {name}")
            continue
        if name not in SLOW_IMPORTS:
            try:
                import_module(MODULES.get(name, name))
            except Exception as error:
                yield Finding(name, "missing", f"{version(name)}, broken: {_sentence(error)}", f"reinstall {name}")
                continue
        yield Finding(name, "ok", version(name))
    for extra in sorted(declared.keys() - {""}):
        absent = [name for name in declared[extra] if not _installed(name)]
        if absent:
            yield Finding(f"extra {extra}", "note", f"without {', '.join(absent)}", f"pip install 'clbench[{extra}]'")
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(f"{name} {version(name)}" for name in declared[extra]))


def _declared() -> dict[str, list[str]]:
    """What clbench's metadata asks for: extra ("" for always) -> distribution names."""
    out: dict[str, list[str]] = {}
    for line in (requires("clbench") or []) if _installed("clbench") else []:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        if name:
            out.setdefault(extra[1] if extra else "", []).append(name[0])
    return out


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _device() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("device", "ok", f"cpu (no CUDA device; {built})")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            f"device cuda:{index}",
            "ok",
            f"{card.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability "
            f"{card.major}.{card.minor}, CUDA {torch.version.cuda}",
        )


def _processor() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf"):
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = page * os.sysconf("SC_PHYS_PAGES") / GIB, page * os.sysconf("SC_AVPHYS_PAGES") / GIB
        memory = f", {free:.1f} of {total:.1f} GiB memory free"
    yield Finding("processor", "ok", f"{cores} cores, torch uses {torch.get_num_threads()} threads{memory}")


def _folders(out: Path) -> Iterator[Finding]:
    from clbench.data.cache import cache_folder

    for topic, folder, option in (("cache", cache_folder(), "CLBENCH_CACHE"), ("results", out, "--out")):
        home = folder.resolve()
        while not home.exists():
            home = home.parent
        free = shutil.disk_usage(home).free / GIB
        state: State = "ok"
        advice = ""
        if not os.access(home, os.W_OK):
            state, advice = "missing", f"cannot be written: choose another with {option}"
        elif free < 1:
            state, advice = "note", "nearly full: remove what is not needed"
        yield Finding(topic, state, f"{folder}, {free:.1f} GiB free", advice)


def _data(roots: Sequence[Path]) -> Iterator[Finding]:
    from clbench.data import admin

    for folder in filter(None, os.environ.get("CLBENCH_DATA", "").split(os.pathsep)):
        if not Path(folder).is_dir():
            advice = "set CLBENCH_DATA to where your data sets are"
            yield Finding("CLBENCH_DATA", "missing", f"{folder} is not a folder", advice)
    found = admin.status(roots)
    usable = [entry.name for entry in found if entry.state not in ("missing", "unusable")]
    absent = [entry.name for entry in found if entry.state == "missing"]
    yield Finding("data", "ok", f"found: {', '.join(usable)}")
    if absent:
        advice = "`clbench data status` lists them; set CLBENCH_DATA to where they are, or `clbench data fetch NAME`"
        yield Finding("data", "note", f"{len(absent)} data sets not found", advice)
    for entry in found:
        if entry.state == "unusable":
            yield Finding(f"data {entry.name}", "missing", "cannot be used", entry.advice)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
