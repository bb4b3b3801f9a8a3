"""Captions from class names: names, wider words and templates of each training domain (`captions.toml`)."""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from clbench.scenarios.prompts import templates

__all__ = ["Domain", "Texts", "class_words", "domains", "step_texts", "vocabulary"]

WIDE = 0.4  # share of the steps in which a domain shows wider words
NOISE = 0.15  # share of those in which a word that means nothing stands before them


@dataclass(frozen=True)
class Domain:
    """One entry of the table. share: of every batch. grey: digits and the like, recoloured and not mirrored. wide: also
    takes `wide_templates`."""

    dataset: str
    share: float
    templates: tuple[str, ...]
    groups: tuple[str, ...] = ()
    grey: bool = False
    wide: bool = False


@cache
def table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "captions.toml").read_text(encoding="utf-8"))


def domains() -> tuple[Domain, ...]:
    return tuple(
        Domain(
            item["dataset"], item["share"], tuple(item["templates"]), tuple(item.get("groups", ())),
            item.get("grey", False), item.get("wide", False),
        )
        for item in table()["domain"]
    )  # fmt: skip


@dataclass(frozen=True)
class ClassWords:
    """names: of each class, the first one first. kind: the wider word of each class, or its last name's last word."""

    names: tuple[tuple[str, ...], ...]
    kind: tuple[str, ...]


def class_words(names: Sequence[str]) -> ClassWords:
    """Synonyms of class names: the parts between commas, the first one and those in small letters (no Latin names).

    >>> class_words(["brown bear, bruin, Ursus arctos"]).names
    (('brown bear', 'bruin'),)
    """
    known, kinds = table()["names"], kind_of()
    out, wide = [], []
    for name in names:
        first, *rest = (part.strip().replace("_", " ") for part in name.split(","))
        own = known.get(first) or [first.lower(), *(part for part in rest if part == part.lower())]
        out.append(tuple(own))
        wide.append(kinds.get(first, own[0] if first in known else own[0].split()[-1]))
    return ClassWords(tuple(out), tuple(wide))


@cache
def kind_of() -> Mapping[str, str]:
    return {member: kind for kind, members in table()["kinds"].items() for member in members}


def wide_templates() -> tuple[str, ...]:
    """What photographs of objects are asked with; {kind} stands for the wider word."""
    kinds = ("a photo of a {}, a type of {kind}.", "a {}, a type of {kind}.", "{}, a {kind}.")
    return (*templates("caltech101"), *templates("cifar100"), *kinds * 6)


def made_up(random: np.random.Generator) -> str:
    """A word that means nothing, such as a brand: two or three syllables."""
    letters = "bcdfgklmnprstvz", "aeiou"
    return "".join(str(random.choice(list(part))) for _ in range(random.integers(2, 4)) for part in letters)


@dataclass(frozen=True)
class Texts:
    """What a step contrasts: `texts`, all different, and for each domain the text of each of its classes (-1: there is
    no image of it)."""

    texts: list[str]
    of_class: list[np.ndarray[Any, np.dtype[np.int64]]]


def step_texts(
    entries: Sequence[tuple[Domain, ClassWords]], present: Sequence[set[int]], random: np.random.Generator
) -> Texts:
    """Draw one caption for each class of which there is an image (`present`). Each domain takes one template (from each
    of its lists as often) and one level: wider words in 40 % of the steps, else a name, the first one half of the time.
    Equal captions are one text."""
    plain = table()["plain"]
    place: dict[str, int] = {}
    of_class = []
    for (domain, words), there in zip(entries, present, strict=True):
        pools = [plain, wide_templates(), domain.templates] if domain.wide else [plain, domain.templates]
        pool = pools[random.integers(len(pools))]
        template = pool[random.integers(len(pool))]
        noise = made_up(random) + " " if domain.wide and random.random() < NOISE else ""
        wide = random.random() < WIDE
        chosen = []
        for number, (names, kind) in enumerate(zip(words.names, words.kind, strict=True)):
            if number not in there:
                chosen.append(-1)
                continue
            first = len(names) == 1 or random.random() < 0.5
            word = kind if wide else names[0] if first else names[random.integers(1, len(names))]
            text = template.replace("{}", noise + word).replace("{kind}", kind)
            chosen.append(place.setdefault(text, len(place)))
        of_class.append(np.array(chosen, np.int64))
    return Texts(list(place), of_class)


def vocabulary(words: Iterable[ClassWords]) -> list[str]:
    """All words of all captions that can be drawn, sorted: what `assets/clip-small.txt` holds."""
    texts = [*table()["plain"], *wide_templates(), *(t for domain in domains() for t in domain.templates)]
    texts += [name for entry in words for names in entry.names for name in names]
    texts += [kind for entry in words for kind in entry.kind]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 1})
