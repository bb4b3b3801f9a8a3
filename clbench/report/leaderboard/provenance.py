"""Where the hyperparameters of a row come from, in one word and in a sentence.

What a record says of each value (`source`) decides:

| badge | means |
|---|---|
| paper | a published recipe for this method and scenario, nothing of it replaced |
| two-phase | tuned on another scenario by a signed study, then frozen |
| tuned in place | tuned on the scenario that it is scored on, or on one that shares classes or images with it |
| own recipe | a recipe of this package that is not a paper's, or that puts together what no paper has run |
| changed | a recipe with values replaced by hand, its backbone or schedule included |
| set by hand | no recipe, values given on the command line: how they were found is not recorded |
| default | the method's and the scenario's defaults |
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from clbench.store.schema import Spec

__all__ = ["BADGES", "Provenance", "is_own", "provenance"]

# from the most to the least binding; a report that must choose one row of a method takes the first of these
BADGES = ("two-phase", "paper", "own recipe", "default", "changed", "set by hand", "tuned in place")
TRAINING = ("batch_size", "epochs", "updates_per_batch", "train_view", "test_view", "mask", "backbone")
# how the sources of recipes say that no paper has them: recipes/*.toml
OWN = re.compile(r"^ours\b|: ours\b|^none published\b|^not in \w+'s table\b|\(reimplementation\)")


class Provenance(NamedTuple):
    badge: str
    text: str


def provenance(spec: Spec) -> Provenance:
    """The badge of a run and the sentence behind it."""
    values = {f"{name}={entry.value}": entry.source for name, entry in spec.hyperparameters.items()}
    options = {name: spec.sources.get(name, "") for name in TRAINING}
    named = {f"{name}={getattr(spec, name)}": source for name, source in options.items()}
    everything = values | named
    tuned = [source for source in everything.values() if source.startswith("tuned on ")]
    if tuned:
        in_place = next((source for source in tuned if "in-scenario" in source or "test rows" in source), None)
        what = _list(key for key, source in everything.items() if source.startswith("tuned on "))
        return Provenance("tuned in place" if in_place else "two-phase", f"{in_place or tuned[0]}: {what}")
    if any(source.startswith("search on ") for source in everything.values()):
        return Provenance("tuned in place", "values drawn by a search on this scenario")
    replaced = [key for key, source in values.items() if source == "--set"]
    replaced += [key for key, source in named.items() if source.startswith("--")]
    if spec.recipe is not None:
        if replaced:
            return Provenance("changed", f"recipe of {spec.recipe}, with {_list(replaced)}")
        return Provenance("own recipe" if is_own(spec.recipe) else "paper", spec.recipe)
    if replaced:
        return Provenance("set by hand", f"defaults of method and scenario, with {_list(replaced)}")
    return Provenance("default", "defaults of method and scenario")


def is_own(recipe: str) -> bool:
    """Whether a recipe, or a part of it that decides the result, is the package's own and not a paper's."""
    return OWN.search(recipe) is not None


def _list(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
