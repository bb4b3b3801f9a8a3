"""What a run changes of its process, and gives back."""

import os

import pytest
import torch

from clbench.learner.run import exact_arithmetic

FLAGS = (
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
    (torch.utils.deterministic, "fill_uninitialized_memory"),
)


@pytest.mark.parametrize("before", [True, False])
def test_exact_arithmetic_on_a_gpu_is_given_back(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only flags, so it needs no GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    kept = [getattr(place, name) for place, name in FLAGS]
    try:
        for place, name in FLAGS:
            setattr(place, name, before)
        with exact_arithmetic(torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert [getattr(place, name) for place, name in FLAGS] == [False] * 4
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.are_deterministic_algorithms_enabled()
        assert [getattr(place, name) for place, name in FLAGS] == [before] * 4
    finally:
        for (place, name), value in zip(FLAGS, kept, strict=True):
            setattr(place, name, value)


def test_a_cpu_is_left_alone() -> None:
    kept = [getattr(place, name) for place, name in FLAGS]
    with exact_arithmetic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
        assert [getattr(place, name) for place, name in FLAGS] == kept
