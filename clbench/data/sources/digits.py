"""The 1,797 handwritten digits that come with scikit-learn: 8x8, 17 grey levels, scaled to 0..255. They have no split
of their own."""

import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from clbench.data.sources import Decoded, Source
from clbench.data.sources.images import resize_all
from clbench.errors import InputError

__all__ = ["count", "embedded", "read"]

FILE = "digits.csv.gz"


def embedded() -> Source:
    """The file inside the installed scikit-learn, found without importing it. Raises InputError if it is not there."""
    spec = find_spec("sklearn")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place, "datasets", "data", FILE)
        if path.is_file():
            return Source("digits", path.parent, (path,))
    raise InputError(f"digits come with scikit-learn, whose {FILE} is not installed: run `pip install scikit-learn`")


def count(source: Source) -> tuple[int, int] | None:
    return None


def read(source: Source, size: int | None) -> Decoded:
    from sklearn.datasets import load_digits

    try:
        data, target = load_digits(return_X_y=True)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{source.files[0]} is damaged ({error}): install scikit-learn again") from error
    images = np.round(data * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return Decoded(resize_all(images, size), target.astype(np.int64), None, tuple(map(str, range(10))))
