"""Files that are either whole or not there: written under a temporary name in the same folder, synced, renamed."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from clbench.errors import ClbenchError, InputError, RunFailed

__all__ = ["atomic_path", "atomic_write_bytes", "explain_os_error", "sync_folder"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def explain_os_error(error: OSError, path: Path, doing: str = "write") -> ClbenchError:
    """The one sentence for an operating-system error at `path`: RunFailed for a full disk, else InputError."""
    if error.errno in FULL:
        return RunFailed(
            f"cannot {doing} {path}: the disk is full ({error.strerror}); free some space and run it again"
        )
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError):  # what making a folder says of a file that is in its place
        reason = f"{error.filename} is a file, not a folder"
    return InputError(f"cannot {doing} {path}: {reason}; check the path and its permissions, or choose another folder")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, what was written there is synced and renamed to
    `path`. When it fails nothing is left and an older file at `path` stays as it was. Makes the folder if need be.

    Raises InputError for an unwritable folder, RunFailed for a full disk; other errors pass through.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name[:100]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)
            sync_folder(final.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, final) from error


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` whole or not at all. Raises as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where the platform can (Windows cannot open folders)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
