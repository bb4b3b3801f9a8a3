"""Files that are whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from clbench.atomic import atomic_path, atomic_write_bytes
from clbench.errors import InputError, RunFailed


def test_whole_file_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    atomic_write_bytes(path, b"one")
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["b.json"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            assert temporary.parent == tmp_path
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "b"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(RunFailed, match=r"cannot write .*/b: the disk is full"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["b"]


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot write .*file/x: .*/file is a file, not a folder; check the path"):
        atomic_write_bytes(tmp_path / "file" / "x", b"")


def test_forgetting_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"), atomic_path(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == []
