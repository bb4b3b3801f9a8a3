"""The size of a data set's images, for builders that change pixels: label tables hold none."""

from clbench.data.catalogue import catalogue
from clbench.data.classes import LabelTable
from clbench.errors import InputError

__all__ = ["num_pixels"]


def num_pixels(table: LabelTable, given: int | None, where: str) -> int:
    """Pixels (height x width) of an image: `given`, else what the catalogue says. Raises InputError if neither does."""
    if given is not None:
        return given
    known = catalogue().get(table.dataset)
    if known is None or len(known.shape) == 1:
        raise InputError(
            f"{where}: the size of its images is not known to the catalogue; give pixels=HEIGHT*WIDTH as one number"
        )
    return known.shape[1] * known.shape[2]
