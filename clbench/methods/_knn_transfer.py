"""KKT: which earlier task's scores a new task should start from, by nearest neighbours (card `exssnet`, section 2).

Features of the new task's images under each earlier mask are split in the order they came: 66 % are looked up in, 34 %
are asked for. The earlier task with the highest accuracy is the source.

Shapes: T earlier tasks, N images, D features, c classes of the task.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FIT_SHARE", "choose_sources", "mean_scores", "neighbour_accuracy", "num_batches"]

FIT_SHARE = 0.66
ASKED_AT_ONCE = 1024  # rows of the distance matrix in memory


def num_batches(per_epoch: int) -> int:
    """Training batches that are looked at: `ceil(0.2 n) + 1`, at most all n.

    >>> num_batches(100), num_batches(1)
    (21, 1)
    """
    return min(-(-per_epoch // 5) + 1, per_epoch)


def neighbour_accuracy(features: Tensor, targets: Tensor, neighbours: int, num_classes: int) -> Tensor:
    """Accuracy, 0-d float64, of a vote among the Euclidean nearest; equal votes go to the lowest class.

    features: (N, D); targets: (N,) int64 in 0..num_classes-1. The first `int(0.66 N)` are looked up in, at most all of
    them vote. Fewer than 3 images give 0.
    """
    fit = int(FIT_SHARE * len(features))
    if fit == 0 or fit == len(features):
        return torch.zeros((), dtype=torch.float64, device=features.device)
    known, labels = features[:fit], targets[:fit]
    squares, k = known.square().sum(1), min(neighbours, fit)
    right = torch.zeros((), dtype=torch.int64, device=features.device)
    for asked, truth in zip(features[fit:].split(ASKED_AT_ONCE), targets[fit:].split(ASKED_AT_ONCE), strict=True):
        distance = squares - 2 * asked @ known.T  # less the asked one's own square, the same for all
        votes = labels[distance.topk(k, largest=False, sorted=False).indices]
        right += (F.one_hot(votes, num_classes).sum(1).argmax(1) == truth).sum()
    return right.double() / (len(features) - fit)


def choose_sources(accuracies: Sequence[float], num_classes: int, rule: str) -> list[int]:
    """Earlier tasks to start from. accuracies: one per earlier task, in [0, 1].

    `knn_best`: the best one if it is strictly above chance `1 / num_classes`; `knn_always`: the best one; `knn_all`:
    all above chance. Equal ones: the earliest. Source: card, section 2.
    """
    if not accuracies:
        return []
    if rule == "knn_all":
        return [task for task, accuracy in enumerate(accuracies) if accuracy > 1 / num_classes]
    best = max(range(len(accuracies)), key=accuracies.__getitem__)
    return [best] if rule == "knn_always" or accuracies[best] > 1 / num_classes else []


def mean_scores(scores: Sequence[Tensor]) -> Tensor:
    """Mean of the sources' scores, in new memory. (The official code averages in place and so changes the mask of the
    first source; card, section 6.5.)"""
    return torch.stack(list(scores)).mean(0)
