"""The badge that says where a row's hyperparameters come from."""

import pytest
from made import hyperparameter, spec

from clbench.report.leaderboard.provenance import BADGES, provenance
from clbench.store.schema import Spec

PAPER = "Zhang et al., ICCV 2023; official code 169d4e6"
OURS = "network of Yadav & Bansal's official code (arXiv 2210.10209); 10 epochs: ours, for a CPU"
STUDY = "tuned on split-cifar100-a@1 (study 6ee268d93ec0)"
IN_PLACE = "tuned on split-cifar100-b@1 (study 6ee268d93ec0, in-scenario: it shares classes or images with this one)"
BY_TEST = "tuned on split-cifar100-b@1 (study 6ee268d93ec0, scored on its test rows)"


@pytest.mark.parametrize(
    ("source", "recipe", "options", "badge"),
    [
        ("default: card", None, {}, "default"),
        (f"recipe: {PAPER}", PAPER, {}, "paper"),
        (f"recipe: {PAPER}", PAPER, {"eval_every": "--eval-every"}, "paper"),  # watching is no hyperparameter
        (f"recipe: {OURS}", OURS, {}, "own recipe"),
        ("recipe: ours: shorter", "ours: shorter", {}, "own recipe"),
        ("recipe: x", "none published: batches of protocol family A, AML's rate", {}, "own recipe"),
        ("recipe: x", "not in OnPro's table: ER's settings of protocol family C", {}, "own recipe"),
        ("recipe: x", "UER (reimplementation), the shared protocol of its authors", {}, "own recipe"),
        (f"recipe: {PAPER}", PAPER, {"epochs": "--epochs"}, "changed"),
        (f"recipe: {PAPER}", PAPER, {"backbone": "--backbone"}, "changed"),
        ("--set", PAPER, {}, "changed"),
        ("--set", None, {}, "set by hand"),
        ("default", None, {"batch_size": "--batch-size"}, "set by hand"),
        (STUDY, None, {}, "two-phase"),
        ("default", None, {"epochs": STUDY}, "two-phase"),
        (IN_PLACE, None, {}, "tuned in place"),
        (BY_TEST, PAPER, {}, "tuned in place"),
        ("search on split-digits-a@1", None, {}, "tuned in place"),
    ],
)
def test_badge(source: str, recipe: str | None, options: dict[str, str], badge: str) -> None:
    document = spec(
        "er", "made@1", 0, 3, hyperparameters={"lr": hyperparameter(0.1, source)}, recipe=recipe,
        sources={"batch_size": "scenario", "epochs": "scenario", "backbone": "default", **options},
    )  # fmt: skip
    found = provenance(Spec.model_validate(document))
    assert found.badge == badge
    assert found.badge in BADGES
    if badge in ("changed", "set by hand"):
        replaced = "lr=0.1" if source == "--set" else next(iter(options))
        assert replaced in found.text
