"""What weights were pretrained on, as tags, and the guard that keeps those images out of a scenario.

Tags are names of image collections: those of `images_of` in `clbench/data/datasets.toml`, and `imagenet` (ImageNet-1k),
`imagenet12k`, `imagenet21k`, `lvd142m` ..., `web` for images collected from the web, `unknown`.
"""

import re
from collections.abc import Iterable, Sequence

__all__ = ["UNKNOWN", "guard", "parse_tags", "tags_of_timm"]

UNKNOWN = "unknown"

# Collections that hold others. LVD-142M and LVD-1689M (DINOv2, DINOv3), Merged-30M and -38M (EVA) and Bamboo contain
# ImageNet-21k by their papers' data sections; ImageNet-12k is timm's selection of well-filled ImageNet-21k classes.
CONTAINS = {
    "imagenet12k": "imagenet",
    "imagenet21k": "imagenet",
    "lvd142m": "imagenet21k",
    "lvd1689m": "imagenet21k",
    "merged30m": "imagenet21k",
    "merged38m": "imagenet21k",
    "bamboo": "imagenet21k",
}
SPELLINGS = {
    "imagenet1k": "imagenet", "imagenet1000": "imagenet", "ilsvrc2012": "imagenet", "in1k": "imagenet",
    "in12k": "imagenet12k", "in21k": "imagenet21k", "in22k": "imagenet21k", "imagenet22k": "imagenet21k",
}  # fmt: skip
# Parts of timm's tags (`augreg_in21k_ft_in1k`). Self-supervised `dino` and `mae` tags name no data; it was ImageNet-1k.
TIMM_PARTS = {
    **SPELLINGS, "inw21k": "imagenet21k", "dino": "imagenet", "mae": "imagenet", "bamboo": "bamboo",
    "lvd142m": "lvd142m", "lvd1689m": "lvd1689m", "m30m": "merged30m", "m38m": "merged38m", "sa1b": "sa1b",
    **dict.fromkeys(
        ("openai", "laion2b", "laion400m", "laiona", "webli", "datacomp1b", "datacompxl", "metaclip", "metaclip2",
         "dfn2b", "dfn5b", "dfndr2b", "merged2b", "yfcc100m", "yfcc15m", "cc12m", "ig1b", "swag", "seer", "jft",
         "mclip", "mclip2"),
        "web",
    ),
}  # fmt: skip


def tags_of_timm(tag: str) -> tuple[str, ...]:
    """Collections named by a timm tag, sorted.

    >>> tags_of_timm("augreg_in21k_ft_in1k")
    ('imagenet', 'imagenet21k')
    >>> tags_of_timm("radio_v4")
    ('unknown',)
    """
    return tuple(sorted({TIMM_PARTS[part] for part in tag.split("_") if part in TIMM_PARTS})) or (UNKNOWN,)


def parse_tags(text: str) -> tuple[str, ...]:
    """Tags from what a person or a file's metadata says, sorted; `none` is no tag.

    >>> parse_tags("ImageNet-1k, CIFAR100")
    ('cifar100', 'imagenet')
    """
    words = (re.sub(r"[\s_]+", "-", word.strip().lower()) for word in re.split(r"[,;+]", text))
    tags = {SPELLINGS.get(word.replace("-", ""), word) for word in words}
    return tuple(sorted(tags - {"", "none"}))


def guard(pretrained_on: Sequence[str], images_of: Iterable[str]) -> str | None:
    """Why weights pretrained on `pretrained_on` must not meet images that come from `images_of`; None if they may.

    >>> guard(("imagenet21k",), ("imagenet",))
    'its weights were pretrained on imagenet21k, which has the images of imagenet'
    >>> guard(("imagenet",), ("cifar100", "tiny-images")) is None
    True
    """
    images = list(images_of)
    for tag in pretrained_on:
        held: str | None = tag
        while held is not None:
            if held in images:
                return f"its weights were pretrained on {tag}, " + (
                    "where these images come from" if held == tag else f"which has the images of {held}"
                )
            held = CONTAINS.get(held)
    if UNKNOWN in pretrained_on and images:
        return (
            "nothing says what its weights were pretrained on, so it may have seen these images "
            "(if you know, say it: --backbone-set pretrained_on=TAG[,TAG], or none)"
        )
    return None
