import pickle
import sys
from dataclasses import replace

import pytest
import torch
from tiny import make_store, split_scenario
from torch.utils.data import DataLoader

from clbench.data import Reader
from clbench.errors import InputError
from clbench.interop.avalanche import to_avalanche
from clbench.interop.rows import RowDataset, ViewTransform, check_store, view_of
from clbench.scenarios.model import Domains

DOMAINS = {
    "permutation": torch.stack([torch.arange(36), torch.arange(36).flip(0)]),
    "rotation": torch.tensor([[0], [90]]),
    "overlay": torch.stack([torch.full((36,), -1), torch.arange(36)]),
}


@pytest.mark.parametrize("kind", [None, *DOMAINS])
def test_images_are_those_of_the_reader(kind: str | None) -> None:
    store = make_store()
    domains = None if kind is None else Domains(kind, DOMAINS[kind])
    rows, domain = torch.tensor([5, 3, 3, 40]), torch.tensor([0, 1, 0, 1])
    dataset = RowDataset(store, rows, store.labels[rows], domain, domains)
    view = view_of("normalize(0.3,0.2)", store, "test_view")
    expected = Reader(store, {"test": "normalize(0.3,0.2)"}, domains)(rows, domain, "test")
    assert len(dataset) == 4
    assert dataset[0][0].dtype == torch.uint8
    assert torch.equal(torch.stack([view(dataset[i][0]) for i in range(4)]), expected)
    images, targets = next(iter(DataLoader(dataset, batch_size=4)))
    assert torch.equal(view.view(images), expected)
    assert targets.tolist() == store.labels[rows].tolist()


def test_an_item_is_a_copy() -> None:
    store = make_store()
    before = store.images[3].clone()
    RowDataset(store, torch.tensor([3]), torch.tensor([0]))[0][0].zero_()
    assert torch.equal(store.images[3], before)


def test_random_views_follow_the_global_generator_and_travel_to_workers() -> None:
    store = make_store()
    view = pickle.loads(pickle.dumps(view_of("pad_crop(2) flip", store, "train_view")))
    assert isinstance(view, ViewTransform)
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(torch.stack([view(store.images[row]) for row in range(20)]))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_bad_input_is_told() -> None:
    store = make_store()
    scenario = split_scenario(store)
    with pytest.raises(InputError, match="'native' is that of a backbone; give test_view"):
        view_of("native", store, "test_view")
    with pytest.raises(InputError, match="has 3 means but the images have 1"):
        view_of("normalize(cifar100)", store, "test_view")
    with pytest.raises(InputError, match="built on tiny, but this is the store of other"):
        check_store(scenario, replace(store, name="other"))
    with pytest.raises(InputError, match="the store of tiny has 30"):
        check_store(scenario, replace(store, labels=store.labels[:30]))
    with pytest.raises(InputError, match="images of 25 pixels"):
        RowDataset(store, torch.tensor([0]), torch.tensor([0]), None, Domains("permutation", torch.arange(25)[None]))


def test_without_avalanche_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "avalanche", None)
    monkeypatch.setitem(sys.modules, "avalanche.benchmarks", None)
    store = make_store()
    with pytest.raises(InputError, match=r"install it with `pip install 'clbench\[avalanche\]'`"):
        to_avalanche(split_scenario(store), store)
