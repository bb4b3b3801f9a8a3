"""Getting published files over the network, through torchvision's download, checksum verified."""

import os
import shutil
import uuid
from pathlib import Path

from clbench.atomic import explain_os_error
from clbench.data.cache import cache_folder
from clbench.data.catalogue import dataset
from clbench.errors import InputError, RunFailed

__all__ = ["fetch"]


def fetch(name: str) -> list[Path]:
    """Download the published files of a known data set into the cache's downloads; files that are there and right stay.

    Returns the files (none for embedded data). A file appears under its name only whole and with the right checksum.
    Raises InputError for data that cannot be downloaded or a missing torchvision, RunFailed if no mirror answers.
    """
    entry = dataset(name)
    if entry.embedded:
        return []
    if entry.download is None:
        raise InputError(
            f"{name} cannot be downloaded: get its files by hand and run `clbench data import PATH --name {name}`"
        )
    try:
        from torchvision.datasets.utils import check_integrity, download_url
    except ImportError as error:
        raise InputError(
            f"downloading {name} needs torchvision, which is not installed: `pip install torchvision`"
        ) from error
    folder = cache_folder() / "downloads" / entry.download.to
    files = [folder / archive for archive in entry.archives]
    for file in files:
        md5 = entry.files[file.name].md5
        if check_integrity(file, md5):
            continue
        incoming = folder / f".{file.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        failures = []
        for mirror in entry.download.mirrors:
            try:
                incoming.mkdir(parents=True, exist_ok=True)
                download_url(mirror + file.name, str(incoming), file.name, md5)
                os.replace(incoming / file.name, file)
                break
            except RuntimeError:  # torchvision's word for a wrong checksum
                failures.append(f"{mirror}{file.name} gave a file with a wrong checksum")
            except OSError as error:  # no network, no such host, disk full
                if isinstance(error.errno, int) and not incoming.is_dir():
                    raise explain_os_error(error, folder) from error
                failures.append(f"{mirror}{file.name}: {getattr(error, 'reason', error)}")
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
        else:
            raise RunFailed(
                f"could not download {name} ({'; '.join(failures)}): check the network, or get {file.name} elsewhere "
                f"(md5 {md5}) and put it into {folder}"
            )
    return files
