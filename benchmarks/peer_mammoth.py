"""Mammoth's experience replay as a peer of `peer_worker.py`, from a checkout (github.com/aimagelab/mammoth).

Its own model `er`, buffer, data loaders and `evaluate` on our images, fed as its CIFAR data sets feed them: a PIL image
per sample, ToTensor and Normalize (no crop and flip, so that the mathematics is the same for all), and a second,
unaugmented tensor of it. No loader workers, so that all time is this process's. Progress bar, logger and system
tracker of its training loop are left out. Its test loaders have the batch size of training.
"""

import sys
from argparse import Namespace
from typing import Any
from unittest import mock

import torch
from peer_worker import BATCH, CAPACITY, LR, TASKS, Peer
from torch import nn


class Mammoth(Peer):
    """The last task of five, its memory full, as for the others."""

    def __init__(self, mammoth: str, **options: Any) -> None:
        super().__init__(**options)
        sys.path.insert(0, mammoth)  # its packages are called `models`, `datasets`, `utils`, `backbone`
        with mock.patch("open_clip.create_model_and_transforms", return_value=(None,) * 3):
            # importing any of its data sets imports all, and one of them downloads CLIP for its transform
            from datasets.utils.continual_dataset import ContinualDataset, store_masked_loaders
        from models.er import Er
        from PIL import Image
        from torchvision.transforms import Compose, Normalize, ToPILImage, ToTensor
        from utils.conf import get_device

        get_device.device = self.device
        normalize = Normalize((0.5,) * 3, (0.25,) * 3)
        view = Compose([ToTensor(), normalize])
        store, scenario = self.store, self.scenario

        class Images(torch.utils.data.Dataset[Any]):
            def __init__(self, parts: Any, train: bool) -> None:
                rows = torch.cat([part.rows for part in parts]).cpu()
                self.data = store.images.cpu()[rows].permute(0, 2, 3, 1).numpy()
                self.targets = torch.cat([part.targets for part in parts]).cpu().numpy()
                self.train, self.unaugmented = train, ToTensor()

            def __len__(self) -> int:
                return len(self.targets)

            def __getitem__(self, index: int) -> Any:
                image, target = Image.fromarray(self.data[index]), self.targets[index]
                if not self.train:
                    return view(image), target
                return view(image), target, self.unaugmented(image.copy())

        class Dataset(ContinualDataset):
            NAME, SETTING, SIZE = "seq-images", "class-il", (32, 32)
            N_TASKS, N_CLASSES_PER_TASK, N_CLASSES = TASKS, 2, 10

            def get_data_loaders(self) -> Any:
                return store_masked_loaders(Images(scenario.tasks, True), Images(scenario.groups, False), self)

            @staticmethod
            def get_transform() -> Any:  # for the memory's images
                return Compose([ToPILImage(), view])

            @staticmethod
            def get_normalization_transform() -> Any:
                return normalize

            @staticmethod
            def get_loss() -> Any:
                return nn.functional.cross_entropy

        args = Namespace(
            joint=False, custom_task_order=None, custom_class_order=None, permute_classes=False, label_perc=1,
            label_perc_by_class=1, validation=None, validation_mode="current", noise_rate=0, seed=None, num_workers=0,
            batch_size=BATCH, drop_last=True, buffer_size=CAPACITY, minibatch_size=BATCH, lr=LR, optimizer="sgd",
            optim_wd=0.0, optim_mom=0.0, optim_nesterov=False, nowand=1, non_verbose=True, debug_mode=False,
            eval_future=False,
        )  # fmt: skip

        def learner(free: bool) -> tuple[Any, Any]:
            dataset = Dataset(args)
            model = Er(self.model(free), dataset.get_loss(), args, dataset.get_transform(), dataset=dataset)
            model.net.to(self.device)
            for task in range(TASKS):
                loader, _ = dataset.get_data_loaders()
                model.meta_begin_task(dataset)
                if task == TASKS - 1:
                    return model, dataset
                for batch in loader:  # fills the memory
                    model.buffer.add_data(examples=batch[2].to(self.device), labels=batch[1].to(self.device))
                model.meta_end_task(dataset)
            raise AssertionError

        free, real = learner(True), learner(False)
        self.batches = {id(model): self.forever(dataset) for model, dataset in (free, real)}
        self.cases = {
            "step": lambda steps: self.run(*free, steps, False),
            "load": lambda steps: self.load(free[0], steps),
            "evaluation": lambda steps: [free[1].evaluate(*free) for _ in range(steps)],
            "end to end": lambda steps: self.run(*real, steps, True),
        }

    def forever(self, dataset: Any) -> Any:
        while True:
            for images, targets, unaugmented in dataset.train_loader:
                yield images.to(self.device), targets.to(self.device, torch.long), unaugmented.to(self.device)

    def run(self, model: Any, dataset: Any, steps: int, watch: bool) -> None:
        for _ in range(steps):
            model.meta_observe(*next(self.batches[id(model)]), epoch=0)
            if watch:
                dataset.evaluate(model, dataset)

    def load(self, model: Any, steps: int) -> None:
        for _ in range(steps):
            _, targets, unaugmented = next(self.batches[id(model)])
            model.buffer.get_data(BATCH, transform=model.transform, device=self.device)
            model.buffer.add_data(examples=unaugmented, labels=targets)
