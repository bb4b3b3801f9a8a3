"""What finetune, joint and er have in common: which weights learn, by which optimiser, over which classes."""

from functools import partial

import pytest
import torch
from tiny import Flat, assert_survives_kill, learner_for, make_store, run, split_scenario
from torch import Tensor

from clbench.learner.learner import Learner
from clbench.methods.er import ER
from clbench.methods.finetune import METHOD as FINETUNE
from clbench.methods.joint import METHOD as JOINT


def head_only(method, **changes) -> Learner:
    """A learner whose reader answers the view `features`, as a run would attach it."""
    learner = learner_for(split_scenario(make_store()), method, config=method.Config(train="head", **changes))
    network = Flat()
    network.load_state_dict(learner.method.backbone.state_dict())
    reader = learner.stream.read

    def features(rows: Tensor, domain: Tensor | None) -> Tensor:
        with torch.no_grad():
            return network(reader(rows, domain, "test"))

    reader.features = features
    return learner


@pytest.mark.parametrize("method", [FINETUNE, JOINT, ER])
def test_only_the_head_learns(method) -> None:
    learner = head_only(method)
    before = {name: value.clone() for name, value in learner.method.backbone.state_dict().items()}
    head = learner.method.classifier.weight.clone()
    run(learner)
    assert all(torch.equal(before[name], value) for name, value in learner.method.backbone.state_dict().items())
    assert not torch.equal(head, learner.method.classifier.weight)
    assert "backbone" not in learner.method.state_dict(), "a frozen backbone is in every checkpoint"


def test_kept_features_give_what_the_images_give() -> None:
    """Head-only training on kept features and on images through a frozen backbone are the same run."""
    kept, live = head_only(ER), learner_for(split_scenario(make_store()), ER, config=ER.Config(train="head"))
    live.method.view, live.method.frozen_backbone = "test", False
    live.evaluator.view = live.evaluator._images.view = "test"
    run(kept)
    run(live)
    assert torch.allclose(kept.method.classifier.weight, live.method.classifier.weight, atol=1e-6)
    assert [hits.tolist() for _, hits in kept.matrix] == [hits.tolist() for _, hits in live.matrix]


def test_adam_survives_a_kill_and_is_adam() -> None:
    config = ER.Config(optimizer="adam", lr=0.01, capacity=20, replay_batch_size=4)
    whole = assert_survives_kill(partial(learner_for, split_scenario(make_store()), ER, config=config))
    assert isinstance(whole.method.optimizer, torch.optim.Adam)


def test_head_only_survives_a_kill() -> None:
    def make(**options) -> Learner:
        learner = head_only(ER, capacity=20)
        learner._save = options.get("save", learner._save)
        learner._checkpoint_steps = options.get("checkpoint_steps")
        return learner

    assert_survives_kill(make, at_most=6)


def test_seen_classes_only() -> None:
    """With train_classes=seen an unseen class gets no gradient, with all it does."""
    gradients = []
    for classes in ("all", "seen"):
        learner = learner_for(split_scenario(make_store()), FINETUNE, config=FINETUNE.Config(train_classes=classes))
        seen = torch.tensor([True, True, False, False, False, False])
        learner.method.loss(torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 0, 1]), seen).backward()
        gradients.append(learner.method.classifier.weight.grad[2:].abs().max().item())
    assert gradients[0] > 0
    assert gradients[1] == 0


def test_task_setting_softmax_stays_inside_the_task() -> None:
    learner = learner_for(split_scenario(make_store(), setting="task"), FINETUNE)
    learner.method.loss(torch.rand(2, 1, 6, 6), torch.tensor([2, 3]), torch.ones(6, dtype=torch.bool)).backward()
    gradient = learner.method.classifier.weight.grad.abs().sum(1)
    assert gradient[[0, 1, 4, 5]].max() == 0
    assert gradient[[2, 3]].min() > 0
    assert learner.method._siblings.sum() == 3 * 4
