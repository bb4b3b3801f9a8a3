"""Where a run runs: an entry for `env.json`. No folder of the user's home is written down."""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.store.schema import Environment

if TYPE_CHECKING:
    import torch

__all__ = ["environment"]


def environment(device: "torch.device | str" = "cpu", *, command: Sequence[str] | None = None) -> Environment:
    """Describe this process, its machine and `device`. command: the arguments, by default those of the process."""
    import numpy as np
    import torch

    import clbench

    device = torch.device(device)
    commit, dirty = _checkout(Path(clbench.__file__).parent)
    name, memory = _processor(), None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    return Environment(
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=[_without_home(word) for word in (_command() if command is None else command)],
        clbench=clbench.__version__,
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        num_processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        device=str(device),
        device_name=name,
        device_memory_bytes=memory,
        cuda=torch.version.cuda if device.type == "cuda" else None,
        driver=_driver() if device.type == "cuda" else None,
    )


def _command() -> list[str]:
    program = Path(sys.argv[0])
    return [program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]]


def _without_home(text: str) -> str:
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if len(home) > 1 else text


def _checkout(package: Path) -> tuple[str | None, bool | None]:
    """Commit of the git checkout that holds the package, and whether the package differs from it. A package that merely
    lies inside someone's repository (a virtual environment) is not tracked there and gives (None, None)."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", package, *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "errors.py") is None:
        return None, None
    status = git("status", "--porcelain", "--", ".")
    return git("rev-parse", "HEAD"), None if status is None else status != ""


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text(errors="replace"))
    except OSError:
        return None
    return found.group(1) if found else None
