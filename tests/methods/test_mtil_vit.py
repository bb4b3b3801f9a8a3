"""ZSCL with a real CLIP ViT-B/16 (random weights) through the MTIL code path: the published names and prompts, the
paper's views at 224 px, a reference set, averaged weights, all data sets tested behind every task."""

import dataclasses

import pytest
import torch
from tiny import run

from clbench.backbones import build as build_backbone
from clbench.data.classes import TEST, TRAIN, ClassTable
from clbench.data.join import join
from clbench.data.reader import Reader
from clbench.data.store import ImageStore
from clbench.evaluator import Evaluator, Schedule
from clbench.learner.learner import Learner
from clbench.learner.resolve import make_method
from clbench.methods.base import Reference
from clbench.methods.zscl import ZSCL
from clbench.rng import generator
from clbench.scenarios import find
from clbench.scenarios.mtil import Params, build
from clbench.scenarios.prompts import class_texts, templates
from clbench.stream import Stream

MODEL = "clip:ViT-B-16-quickgelu"
# two classes each where the prompts allow it; the lists of EuroSAT and MNIST name ten
NAMES = {
    "aircraft": ("707-320", "A300B4"), "caltech101": ("Leopards", "brain"), "cifar100": ("apple", "aquarium_fish"),
    "dtd": ("banded", "dotted"), "eurosat": tuple(map(str, range(10))), "flowers102": ("pink primrose", "daffodil"),
    "food101": ("apple_pie", "sushi"), "mnist": tuple(map(str, range(10))), "oxford-pet": ("Abyssinian", "beagle"),
    "stanford-cars": ("Audi A4", "BMW M3"), "sun397": ("abbey", "apartment_building/outdoor"),
}  # fmt: skip
SIDE = 32  # as stored; the views of a run bring them to 224
VIEWS = {
    "train": "resize(224,bicubic) random_resized_crop(224,bicubic,scale=0.9:1) normalize(clip)",
    "test": "resize(224,bicubic) normalize(clip)",
}


def store_of(name: str) -> ImageStore:
    """Drawn images: one training and one test row per class."""
    classes = len(NAMES[name])
    labels = torch.arange(classes).repeat_interleave(2)
    shape = (2 * classes, 3, SIDE, SIDE)
    images = torch.randint(0, 256, shape, generator=generator(0, "mtil", name), dtype=torch.uint8)
    split = torch.tensor([TRAIN, TEST], dtype=torch.uint8).repeat(classes)
    table = ClassTable(NAMES[name], torch.zeros(classes, dtype=torch.int64), torch.full((classes,), -1))
    return ImageStore(images, labels, split, table, name, f"drawn {name}")


def learner_of(names: list[str], **hyperparameters: object) -> Learner:
    stores = [store_of(name) for name in names]
    defaults = dataclasses.replace(find("mtil").defaults, batch_size=1)
    scenario = build([store.table() for store in stores], 0, Params(), defaults=defaults)
    reader = Reader(join(stores), VIEWS)
    stream = Stream(scenario, reader, seed=0)
    network = build_backbone(MODEL, in_shape=(3, 224, 224), seed=0, pretrained=False)
    pictures = torch.rand((1, 3, 224, 224), generator=generator(0, "reference"))
    reference = Reference(1, ("a photo of a dog.", "a red door."), lambda rows: pictures[rows], "one drawn picture")
    config = ZSCL.Config(iterations=1, warmup=1, lr=1e-6, average_every=1, **hyperparameters)
    method = make_method(ZSCL, config, network, scenario, stream, reference)
    evaluator = Evaluator(scenario, reader, view="test", mask="task", per_group=1, slots=1, seed=0, chunk=8)
    return Learner(scenario, stream, method, evaluator, Schedule(0))


def check(learner: Learner, names: list[str]) -> None:
    scale = learner.method.backbone.log_scale.detach().clone()
    start = [weight.detach().clone() for weight in learner.method.backbone.trainable()]
    run(learner)
    sizes = [len(NAMES[name]) for name in names]
    assert [after for after, _ in learner.matrix] == list(range(len(names)))
    for _, hits in learner.matrix:
        assert all(0 <= hit <= size for hit, size in zip(hits.tolist(), sizes, strict=True)), "all test sets, each time"
    assert learner.losses.names == ["loss", "ce", "image", "text", "wc"]
    assert torch.equal(learner.method.backbone.log_scale, scale)
    moved = sum(bool((w != s).any()) for w, s in zip(learner.method.backbone.trainable(), start, strict=True))
    assert moved == len(start), "both towers were trained"
    first = 0
    for index, name in enumerate(names):
        weights = learner.method.classifier(index)
        texts = learner.method._texts_of.tasks[index].prompts
        words = class_texts(name, NAMES[name], "")
        assert [row[0] for row in texts] == [template.format(words[0]) for template in templates(name)]
        assert (weights.norm(dim=1) > 0.99).nonzero()[:, 0].tolist() == list(range(first, first + sizes[index]))
        first += sizes[index]


def test_two_domains() -> None:
    names = ["aircraft", "caltech101"]
    learner = learner_of(names, reference_batch=1)
    assert sum(p.numel() for p in learner.method.backbone.parameters()) == 149_620_737
    check(learner, names)


@pytest.mark.slow
def test_all_eleven_domains() -> None:
    learner = learner_of(list(NAMES), reference_batch=1)
    assert list(NAMES) == [name.removesuffix("-full") for name in find("mtil").datasets]
    check(learner, list(NAMES))
