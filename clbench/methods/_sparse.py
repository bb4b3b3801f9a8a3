"""Sparse layers whose units have ages: which units learn, which connections are dropped and grown, what is frozen.

The boolean tensor operations of SHARP (card `sharp`, section 2). A connection mask is (units, sources) bool: a source
of a convolution is a channel, its connection a kernel of `area` weights; a source of a linear layer is an input.
Ages are int64: 0 plastic, 1 learning the current episode, 2 and more learned earlier.

Shapes: U units of a layer, V sources of it.
"""

import math

import torch
from torch import Tensor

__all__ = ["drop", "grow", "most_active", "promote", "redraw_std", "select", "source_ages"]


def most_active(activity: Tensor, percent: float) -> Tensor:
    """(U,) activity >= 0 -> indices of the fewest units, most active first, that have `percent` of the total.

    The unit that reaches the threshold is included, the lower index comes first among equals; an all-zero layer gives
    one unit. Source: card, step 7.
    """
    values = activity.double().cpu()  # sums in a fixed order: a GPU's cumulative sum may differ from run to run
    ordered, indices = values.sort(descending=True, stable=True)
    below = ordered.cumsum(0) < values.sum() * percent / 100
    return indices[: int(below.sum()) + 1].to(activity.device)


def select(ages: Tensor, chosen: Tensor) -> Tensor:
    """(U,) ages after a selection: of the plastic and learning units the chosen ones learn, all others are plastic.

    chosen: indices, of units of any age. Ages from 2 on stay. Source: card, steps 8 and 9.
    """
    picked = torch.zeros_like(ages).index_fill_(0, chosen, 1)
    return torch.where(ages < 2, picked, ages)


def source_ages(ages: Tensor, inputs_per_unit: int) -> Tensor:
    """(units,) ages of the layer below -> (V,) ages of the sources; a channel owns a block of a linear layer's."""
    return ages.repeat_interleave(inputs_per_unit)


def drop(connected: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """(U, V) bool, the connections to be dropped: from plastic sources to units that are not. Source: card, step 10.

    connected: (U, V) bool; sources: (V,) and targets: (U,) ages.
    """
    return connected & (targets != 0)[:, None] & (sources == 0)[None, :]


def grow(
    connected: Tensor, targets: Tensor, quota: int, area: int, rng: torch.Generator | None = None
) -> tuple[Tensor, int]:
    """Connect `quota // area` absent connections into plastic units, drawn uniformly; the weights start from 0.

    connected: (U, V) bool; targets: (U,) ages; quota: scalar weights to grow. Returns the new mask and the weights for
    which there was no place (rest of an incomplete kernel not counted). Source: card, step 11.
    """
    places = (~connected & (targets == 0)[:, None]).flatten().nonzero()[:, 0]
    wanted = quota // area
    if len(places) > wanted:
        order = torch.randperm(len(places), generator=rng, device=places.device)
        places, left = places[order[:wanted]], 0
    else:
        left = quota - len(places) * area
    grown = connected.flatten().index_fill(0, places, True)
    return grown.view_as(connected), left


def promote(ages: Tensor) -> Tensor:
    """(U,) ages at the end of an episode: all but the plastic units are one episode older."""
    return ages + (ages != 0).long()


def redraw_std(num_plastic: int, area: int) -> float:
    """Standard deviation of re-drawn weights: Kaiming normal with the fan out of the re-drawn rows alone (card, step 4
    of the end of an episode)."""
    return math.sqrt(2 / (num_plastic * area))
