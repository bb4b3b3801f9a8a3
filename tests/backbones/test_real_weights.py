"""The ImageNet MobileNetV2 that lies beside the real data (`../weights` of a CLBENCH_DATA folder) on CIFAR-100."""

import os
from pathlib import Path

import pytest
import torch

from clbench import backbones, data

FOLDERS = [Path(part) for part in os.environ.get("CLBENCH_DATA", "").split(os.pathsep) if part]
FILES = [file for folder in FOLDERS if (file := folder.parent / "weights" / "mobilenetv2_100.safetensors").is_file()]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILES, reason="needs CLBENCH_DATA with weights/mobilenetv2_100.safetensors beside it"),
]

CLASSES, PER_CLASS = 10, 20


def test_mobilenet_separates_classes_it_was_not_trained_on(tmp_path: Path) -> None:
    net = backbones.build(
        "mobilenetv2_100",
        in_shape=(3, 128, 128),
        seed=0,
        weights=FILES[0],
        options={"pad_type": "same", "bn_eps": "1e-3"},
    )
    assert net.num_features == 1280
    assert net.pretrained_on == ("imagenet",)  # the file says so
    store = data.load("cifar100")
    assert backbones.guard(net.pretrained_on, store.images_of) is None
    assert backbones.guard(net.pretrained_on, ["imagenet"]) is not None
    reader = data.Reader(store, {"test": "resize(128,bicubic) normalize(0.5,0.5)"})
    rows = torch.cat([
        torch.nonzero((store.labels == label) & (store.split == split)).flatten()[:PER_CLASS]
        for label in range(CLASSES)
        for split in (data.TRAIN, data.TEST)
    ])  # fmt: skip
    bank = backbones.FeatureBank(
        net, lambda some: reader(some, view="test"), rows, {"store": store.fingerprint}, tmp_path
    )
    bank.extract()
    features = torch.nn.functional.normalize(bank(rows)).view(CLASSES, 2, PER_CLASS, -1)
    means = features[:, 0].mean(1)
    predicted = torch.cdist(features[:, 1].flatten(0, 1), means).argmin(1)
    accuracy = (predicted.view(CLASSES, PER_CLASS) == torch.arange(CLASSES)[:, None]).float().mean()
    assert float(accuracy) > 0.65  # chance is 0.1
