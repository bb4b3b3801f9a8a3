"""The cache: fast, keyed by content, whole or absent, mended when damaged."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import datafiles
import numpy as np
import pytest
import torch

from clbench.data import admin, load
from clbench.data.sources import cifar, folder
from clbench.errors import InputError, RunFailed


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("store/*"))


def test_second_load_reads_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = datafiles.write_folder(tmp_path / "d", datafiles.make())
    first = load(path)
    monkeypatch.setattr(folder, "read", None)
    again = load(path)
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.images, first.images)


def test_writing_to_the_images_does_not_reach_the_cache(tmp_path: Path) -> None:
    path = datafiles.write_folder(tmp_path / "d", datafiles.make())
    store = load(path)
    before = store.images.clone()
    store.images.zero_()
    assert torch.equal(load(path).images, before)


@pytest.mark.parametrize("keep_date", [False, True])
def test_a_changed_file_is_noticed(keep_date: bool, tmp_path: Path) -> None:
    data = datafiles.make()
    root = datafiles.write_cifar(tmp_path / "d", data)
    first = load(root)
    stat = (root / "train").stat()
    changed = data.images.copy()
    changed[5] ^= 1
    time.sleep(0.02)  # longer than a tick of the file system's clock
    datafiles.write_cifar(root, datafiles.Pixels(changed, data.labels, data.test))
    if keep_date:
        os.utime(root / "train", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (root / "train").stat().st_size == stat.st_size
    assert load(root).fingerprint != first.fingerprint


def test_the_same_content_elsewhere_shares_the_entry(tmp_path: Path, cache: Path) -> None:
    first = load(datafiles.write_folder(tmp_path / "a" / "d", datafiles.make()))
    load(datafiles.write_folder(tmp_path / "b" / "d", datafiles.make()))
    assert len(entries(cache)) == 1
    assert len(first) == 27


DAMAGE = {
    "images cut": ("images.npy", lambda p: datafiles.cut(p, 0.5)),
    "images gone": ("images.npy", Path.unlink),
    "labels flipped": ("labels.npy", lambda p: datafiles.flip_byte(p, -8)),
    "split flipped": ("split.npy", lambda p: datafiles.flip_byte(p, -1)),
    "manifest flipped": ("manifest.json", lambda p: datafiles.flip_byte(p, 60)),
    "manifest cut": ("manifest.json", lambda p: datafiles.cut(p, 0.5)),
    "fingerprint changed": (
        "manifest.json",
        lambda p: p.write_text(p.read_text().replace('"fingerprint": "', '"fingerprint": "0')),
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_entry_is_built_again(case: str, tmp_path: Path, cache: Path) -> None:
    path = datafiles.write_folder(tmp_path / "d", datafiles.make())
    first = load(path)
    name, damage = DAMAGE[case]
    (entry,) = entries(cache)
    before = {file.name: file.read_bytes() for file in entry.iterdir()}
    damage(entry / name)
    assert load(path).fingerprint == first.fingerprint
    assert entries(cache) == [entry]
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == before


def test_verify_finds_a_flipped_pixel(tmp_path: Path, cache: Path) -> None:
    path = datafiles.write_folder(tmp_path / "d", datafiles.make())
    first = load(path)
    pixels = first.images.clone()
    assert all(check.ok for check in admin.verify(str(path)))
    del first
    (entry,) = entries(cache)
    datafiles.flip_byte(entry / "images.npy", -5)
    checks = {check.what: check for check in admin.verify(str(path))}
    assert not checks["cache entry"].ok
    assert "built again" in checks["cache entry"].detail
    assert checks["source against cache"].ok
    assert torch.equal(load(path).images, pixels)
    assert all(check.ok for check in admin.verify(str(path)))


def test_a_damaged_index_only_costs_a_reading(tmp_path: Path, cache: Path) -> None:
    path = datafiles.write_folder(tmp_path / "d", datafiles.make())
    first = load(path)
    (index,) = cache.glob("index/*.json")
    datafiles.cut(index, 0.5)
    assert load(path).fingerprint == first.fingerprint


def build_at_once(
    path: Path, start: "multiprocessing.synchronize.Barrier", results: "multiprocessing.Queue[str]"
) -> None:
    start.wait(30)
    try:
        store = load(path)
        results.put(f"{store.fingerprint} {int(store.images.long().sum())}")
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_may_build_the_same_entry_at_once(damaged: bool, tmp_path: Path, cache: Path) -> None:
    data = datafiles.make(train=300, test=60)
    path = datafiles.write_cifar(tmp_path / "d", data)
    if damaged:
        load(path)
        datafiles.flip_byte(entries(cache)[0] / "labels.npy", -8)
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=build_at_once, args=(path, start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    answers = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert answers == {f"{load(path).fingerprint} {int(data.images.astype(np.int64).sum())}"}
    assert len(list((cache / "store").iterdir())) == 1, "nothing half-built is left"


def test_full_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = datafiles.write_cifar(tmp_path / "d", datafiles.make())
    real = os.fsync

    def fsync(handle: int) -> None:
        if "images.npy" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunFailed, match=r"cannot write .*store/d-.*: the disk is full"):
        load(path)
    assert entries(cache) == []
    monkeypatch.setattr(os, "fsync", real)
    assert len(load(path)) == 27


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = datafiles.write_folder(tmp_path / "d", datafiles.make())
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot write .*file/cache.*: Not a directory"):
        load(path)


def test_what_a_dead_process_left_is_swept(tmp_path: Path, cache: Path) -> None:
    old, young = cache / "store" / ".d-0.1-2.tmp", cache / "store" / ".d-0.3-4.tmp"
    for leftover in (old, young):
        leftover.mkdir(parents=True)
        (leftover / "images.npy").write_bytes(b"half")
    os.utime(old, (1, 1))
    load(datafiles.write_folder(tmp_path / "d", datafiles.make()))
    assert not old.exists()
    assert young.exists(), "it may still be at work"


def test_import_stands_on_its_own(tmp_path: Path, cache: Path) -> None:
    path = datafiles.write_cifar(tmp_path / "d", datafiles.make())
    direct = load(path)
    record = admin.import_(path, "my-animals")
    assert (record.name, record.state) == ("my-animals", "imported")
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    store = load("my-animals")
    assert store.name == "my-animals"
    assert store.fingerprint == direct.fingerprint
    assert "my-animals" in {entry.name for entry in admin.status()}
    assert all(check.ok for check in admin.verify("my-animals"))
    with pytest.raises(InputError, match=r"its source .* is gone"):
        load("my-animals", size=16)
    folder_of = next(entry for entry in entries(cache) if entry.name.startswith("my-animals"))
    datafiles.flip_byte(folder_of / "labels.npy", -8)
    with pytest.raises(InputError, match=r"run `clbench data import PATH --name my-animals` again"):
        load("my-animals")
    assert not all(check.ok for check in admin.verify("my-animals"))


def test_a_damaged_import_is_mended_from_its_source(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = datafiles.write_cifar(tmp_path / "d", datafiles.make())
    admin.import_(path, "my-animals")
    first = load("my-animals")
    datafiles.flip_byte(entries(cache)[0] / "split.npy", -1)
    assert load("my-animals").fingerprint == first.fingerprint
    assert load("my-animals", order="source").fingerprint != first.fingerprint
    monkeypatch.setattr(cifar, "read", None)
    assert load("my-animals").fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["Birds", "my birds", "../x", "", "a/b"])
def test_import_refuses_odd_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be a name"):
        admin.import_(datafiles.write_cifar(tmp_path / "d", datafiles.make()), name)
