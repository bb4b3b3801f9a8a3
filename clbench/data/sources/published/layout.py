"""What a published layout is: the marks it is recognised by, and the list of its images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from clbench.atomic import explain_os_error
from clbench.data.classes import TEST, TRAIN
from clbench.errors import InputError

__all__ = ["Layout", "Listing", "listed", "read_lines"]


class Listing(NamedTuple):
    """Every image of a data set, in its source's order. labels: ids into names. split: TRAIN or TEST. lists: files it
    was read from, besides the layout's marks."""

    names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    split: tuple[int, ...]
    lists: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A folder as its makers publish it.

    name: in the catalogue. read: its folder -> what is in it. marks: files and folders that must be there; the first
    one tells that it is this layout. Without marks its folder must bear its name and be cut into classes, not parts.
    inside: where it may lie below the folder that was unpacked.
    """

    name: str
    read: Callable[[Path], Listing]
    marks: tuple[str, ...] = ()
    inside: tuple[str, ...] = ("",)

    def is_at(self, root: Path) -> bool:
        """Whether `root` is such a folder, complete or not."""
        if self.marks:
            return (root / self.marks[0]).exists()
        return root.absolute().name.lower().replace("_", "-") == self.name and not (root / "train").exists()


def listed(names: list[str], train: list[tuple[Path, int]], test: list[tuple[Path, int]], where: Path) -> Listing:
    """A listing from (image, label) pairs; InputError for a label without a name. where: names the folder in it."""
    both = [*train, *test]
    for file, label in both:
        if not 0 <= label < len(names):
            most = len(names) - 1
            raise InputError(f"{where}: {file.name} is of class {label}, not one of 0 to {most}; get the lists again")
    split = (TRAIN,) * len(train) + (TEST,) * len(test)
    return Listing(tuple(names), tuple(file for file, _ in both), tuple(label for _, label in both), split)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without the spaces around them."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: it is not text; get it again") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
