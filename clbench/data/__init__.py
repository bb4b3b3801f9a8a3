"""Data: real images in canonical row order, memory-mapped, and the batched views they are read through.

Names are imported on first use, so that the catalogue can be read without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clbench.data.classes import TEST, TRAIN, ClassTable, LabelTable
    from clbench.data.loading import load, load_all
    from clbench.data.reader import Reader
    from clbench.data.store import ImageStore
    from clbench.data.views import View, parse_view

__all__ = [
    "TEST",
    "TRAIN",
    "ClassTable",
    "ImageStore",
    "LabelTable",
    "Reader",
    "View",
    "load",
    "load_all",
    "parse_view",
]

_HOMES = {
    "TEST": "classes", "TRAIN": "classes", "ClassTable": "classes", "LabelTable": "classes", "load": "loading",
    "load_all": "loading",
    "Reader": "reader", "ImageStore": "store", "View": "views", "parse_view": "views",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
