"""A real CLIP of a few thousand parameters, scenarios with prompts, and reference sets made by hand, for tests."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from tiny import EVERY_STEP, learner_for, make_store, split_scenario
from torch import Tensor

from clbench.backbones.backbone import fingerprint
from clbench.backbones.clip_model import ClipBackbone
from clbench.backbones.clip_small import WordTokenizer
from clbench.evaluator import Schedule
from clbench.learner.learner import Learner
from clbench.methods.base import Method, Reference
from clbench.rng import generator
from clbench.scenarios.model import Scenario

SIZE, VOCABULARY = 6, 128
WORDS = ("photo", "drawing", "class", "of", "the")
PROMPTS = ("a photo of a {}.", "a drawing of the {}.")
VIEWS = {"train": "rgb", "test": "rgb"}


def tiny_clip(seed: int = 0, width: int = 16) -> ClipBackbone:
    """Two transformers of one layer; images of 3 x 6 x 6."""
    from open_clip.model import CLIP

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = CLIP(
            embed_dim=width,
            vision_cfg={"image_size": SIZE, "patch_size": 3, "width": width, "layers": 1, "head_width": 8},
            text_cfg={"context_length": 32, "vocab_size": VOCABULARY, "width": width, "heads": 2, "layers": 1},
        )
    tokenizer = WordTokenizer(WORDS, context_length=32, vocab_size=VOCABULARY)
    backbone = ClipBackbone(net, tokenizer, name="tiny-clip", identity=f"tiny-clip {width}", in_shape=(3, SIZE, SIZE))
    backbone.num_features = width
    backbone.fingerprint = fingerprint(backbone)
    return backbone


def prompted(tasks: int = 2, **changes: Any) -> Scenario:
    """Task-incremental on tiny images, with two prompts per task."""
    prompts = dict.fromkeys(range(tasks), PROMPTS)
    return split_scenario(make_store(), tasks, **{"setting": "task", "prompts": prompts, **changes})


def reference_set(number: int = 12, texts: int = 7) -> Reference:
    """Drawn images and made-up sentences."""
    images = torch.rand((number, 3, SIZE, SIZE), generator=generator(0, "reference"))
    sentences = tuple(f"a photo of the thing {index}." for index in range(texts))
    return Reference(number, sentences, lambda rows: images[rows], f"drawn {number} {texts}")


def clip_learner(
    method: type[Method],
    *,
    scenario: Scenario | None = None,
    reference: Reference | None = None,
    backbone: Callable[[], ClipBackbone] = tiny_clip,
    schedule: Schedule = EVERY_STEP,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    checkpoint_steps: int | None = None,
    **hyperparameters: Any,
) -> Learner:
    """A learner as a run makes it; few steps per task unless said otherwise."""
    given = {"iterations": 4, "warmup": 2, "lr": 1e-3, **hyperparameters}
    known = {field.name for field in dataclasses.fields(method.Config)}
    learner = learner_for(
        scenario or prompted(), method, backbone=backbone, views=VIEWS, schedule=schedule, save=save,
        checkpoint_steps=checkpoint_steps, config=method.Config(**{k: v for k, v in given.items() if k in known}),
    )  # fmt: skip
    wanted = reference if reference is not None else reference_set()
    learner.method.setting = dataclasses.replace(learner.method.setting, reference=wanted)
    return learner


def weights_of(learner: Learner) -> list[Tensor]:
    """Copies of all parameters of the network."""
    return [parameter.detach().clone() for parameter in learner.method.backbone.parameters()]
