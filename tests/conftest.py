"""All tests: one thread (small operations on shared cores are slower on two), the same examples of properties in every
run, and a data cache of their own."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in the interpreter; read when Triton is first imported
# the same examples in every run, so that only a change turns it red; --hypothesis-profile=explore draws others
settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing a test does touches the user's cache, and nothing in it changes a test."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CLBENCH_CACHE"] = str(folder)
    return folder
