"""Downloads, from a server on this machine's loopback."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datafiles
import pytest
from test_known_data import known, md5_of

from clbench.data import admin, load
from clbench.data.catalogue import Download, KnownFile, catalogue
from clbench.errors import InputError, RunFailed

pytest.importorskip("torchvision")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/", folder
        http.shutdown()


@pytest.fixture
def tiny(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A known data set `tiny` whose archive the server has, behind a mirror that doesn't."""
    url, folder = server
    data = datafiles.make()
    archive = datafiles.write_cifar_tar(folder / "tiny-python.tar.gz", data)
    entry = replace(
        known("tiny", data),
        files={archive.name: KnownFile(md5=md5_of(archive.read_bytes()))},
        download=Download(mirrors=(f"{url}absent/", url)),
    )
    monkeypatch.setitem(catalogue(), "tiny", entry)
    return archive


def test_fetch_and_load(tiny: Path, cache: Path) -> None:
    with pytest.raises(InputError, match="clbench data fetch tiny"):
        load("tiny")
    (file,) = admin.fetch("tiny")
    assert file.read_bytes() == tiny.read_bytes()
    assert [path.name for path in (cache / "downloads").iterdir()] == [tiny.name], "no temporary files are left"
    store = load("tiny")
    assert store.name == "tiny"
    tiny.unlink()
    assert admin.fetch("tiny") == [file], "what is there and right is not fetched again"


def test_load_may_download(tiny: Path) -> None:
    assert load("tiny", allow_download=True).fingerprint == load(tiny).fingerprint


def test_wrong_checksum_leaves_nothing(tiny: Path, cache: Path) -> None:
    datafiles.flip_byte(tiny, 100)
    with pytest.raises(
        RunFailed, match=r"could not download tiny .*tiny-python\.tar\.gz gave a file with a wrong checksum"
    ):
        admin.fetch("tiny")
    assert not list((cache / "downloads").iterdir())


def test_no_network(tiny: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    dead = Download(mirrors=("http://127.0.0.1:9/",))
    monkeypatch.setitem(catalogue(), "tiny", replace(catalogue()["tiny"], download=dead))
    with pytest.raises(RunFailed) as caught:
        admin.fetch("tiny")
    message = str(caught.value)
    assert "http://127.0.0.1:9/tiny-python.tar.gz" in message
    assert str(cache / "downloads") in message
    assert "\n" not in message


def test_a_damaged_download_is_replaced(tiny: Path, cache: Path) -> None:
    (file,) = admin.fetch("tiny")
    datafiles.flip_byte(file, 50)
    with pytest.raises(InputError, match="run `clbench data fetch tiny`"):
        load("tiny")
    admin.fetch("tiny")
    assert len(load("tiny")) == 27


def test_what_cannot_be_downloaded() -> None:
    assert admin.fetch("digits") == []
    with pytest.raises(InputError, match=r"cifar10-subset cannot be downloaded"):
        admin.fetch("cifar10-subset")
    with pytest.raises(InputError, match=r"did you mean 'cifar10'"):
        admin.fetch("cifar1O")
