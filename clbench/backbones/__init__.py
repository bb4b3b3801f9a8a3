"""Backbones: networks from images to features, built in or from timm, with where their weights come from.

Names are imported on first use, so that `list_backbones` answers without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clbench.backbones.backbone import Backbone, fingerprint
    from clbench.backbones.catalogue import list_backbones
    from clbench.backbones.factory import build, native_view
    from clbench.backbones.features import FeatureBank
    from clbench.backbones.heads import CosineHead, LinearHead
    from clbench.backbones.provenance import guard

__all__ = [
    "Backbone", "CosineHead", "FeatureBank", "LinearHead", "build", "fingerprint", "guard", "list_backbones",
    "native_view",
]  # fmt: skip

_HOMES = {
    "Backbone": "backbone", "fingerprint": "backbone", "list_backbones": "catalogue", "build": "factory",
    "native_view": "factory", "FeatureBank": "features", "CosineHead": "heads", "LinearHead": "heads",
    "guard": "provenance",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
