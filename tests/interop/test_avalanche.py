"""With Avalanche itself: `tox -e avalanche`."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_samples import assert_same_tables
from tiny import make_store, rows_of, split_scenario
from torch import Tensor, nn

from clbench.data import TEST, ImageStore, Reader, load
from clbench.errors import InputError
from clbench.scenarios import build, find, list_scenarios
from clbench.scenarios.check import check_scenario
from clbench.scenarios.model import Domains, Scenario

pytest.importorskip("avalanche", reason="wants the extra `avalanche`")
from avalanche.benchmarks import benchmark_from_datasets, class_incremental_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche.core import SupervisedPlugin
from avalanche.training import Naive, Replay
from avalanche.training.plugins import EvaluationPlugin

from clbench.interop.avalanche import from_avalanche, to_avalanche

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits() -> ImageStore:
    return load("digits")


def digits_scenario(store: ImageStore, preset: str = "split-digits", **given: str) -> Scenario:
    return build(find(preset).with_params(given), [store.table()], 0)


class Seen(SupervisedPlugin):
    """Keeps the targets, rows and task labels of every minibatch, per call of train and per evaluated experience."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[list[list[Tensor]]] = []
        self.asked: list[list[list[Tensor]]] = []

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.trained.append([])

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        self.trained[-1].append([part.clone() for part in strategy.mbatch])

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        self.asked.append([])

    def after_eval_iteration(self, strategy: Any, **_: Any) -> None:
        self.asked[-1].append([part.clone() for part in strategy.mbatch])


def strategy(kind: Callable[..., Any], **options: Any) -> tuple[Any, Seen]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, options.pop("pixels", 64)))
    seen = Seen()
    made = kind(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        train_mb_size=10, eval_mb_size=50, plugins=[seen], evaluator=quiet(), **options,
    )  # fmt: skip
    return made, seen


def quiet() -> EvaluationPlugin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it has no loggers
        return EvaluationPlugin()


def column(batches: list[list[Tensor]], index: int) -> list[int]:
    return torch.cat([batch[index] for batch in batches]).tolist()


@pytest.mark.parametrize("shuffle", [False, True])
def test_naive_sees_exactly_our_rows(digits: ImageStore, shuffle: bool) -> None:
    scenario = digits_scenario(digits)
    benchmark = to_avalanche(scenario, digits)
    naive, seen = strategy(Naive)
    for experience in benchmark.train_stream:
        naive.train(experience, shuffle=shuffle)
    naive.eval(benchmark.test_stream)
    assert len(seen.trained) == len(scenario.tasks)
    for batches, task in zip(seen.trained, scenario.tasks, strict=True):
        pairs = list(zip(column(batches, 2), column(batches, 1), strict=True))
        ours = list(zip(task.rows.tolist(), task.targets.tolist(), strict=True))
        assert sorted(pairs) == sorted(ours)
        assert (pairs == ours) == (not shuffle)
        images = torch.cat([batch[0] for batch in batches])
        rows = torch.tensor(column(batches, 2))
        assert torch.equal(images, Reader(digits, {"test": scenario.defaults.train_view})(rows, None, "test"))
    for batches, group in zip(seen.asked, scenario.groups, strict=True):
        assert column(batches, 2) == group.rows.tolist()
        assert column(batches, 1) == group.targets.tolist()


@pytest.mark.filterwarnings("ignore:Call to deprecated function update")
def test_replay_sees_our_rows_and_replays_earlier_ones(digits: ImageStore) -> None:
    scenario = digits_scenario(digits)
    benchmark = to_avalanche(scenario, digits)
    replay, seen = strategy(Replay, mem_size=50)
    target_of = {}
    for task in scenario.tasks:
        target_of.update(zip(task.rows.tolist(), task.targets.tolist(), strict=True))
    for index, experience in enumerate(benchmark.train_stream):
        replay.train(experience, shuffle=False)
        batches = seen.trained[index]
        new = [row for batch in batches for row in batch[2].tolist() if row in set(scenario.tasks[index].rows.tolist())]
        assert new == scenario.tasks[index].rows.tolist()
        earlier = {row for task in scenario.tasks[:index] for row in task.rows.tolist()}
        old = [row for row in column(batches, 2) if row not in set(new)]
        assert set(old) <= earlier
        assert bool(old) == (index > 0)
        assert [target_of[row] for row in column(batches, 2)] == column(batches, 1)
        buffer = next(p for p in replay.plugins if hasattr(p, "storage_policy")).storage_policy.buffer
        assert len(buffer) == 50
        assert set(buffer.rows) <= earlier | set(new)
    replay.eval(benchmark.test_stream)
    assert [column(batches, 2) for batches in seen.asked] == [group.rows.tolist() for group in scenario.groups]


@pytest.mark.parametrize("id", [row["id"] for row in list_scenarios() if row["datasets"] == ["digits"]])
def test_every_family_goes_there_and_comes_back(id: str) -> None:
    preset = find(id)
    store = load("digits", order=preset.row_order, size=preset.size)
    scenario = build(preset, [store.table()], 0)
    benchmark = to_avalanche(scenario, store)
    reader = Reader(store, {"test": scenario.defaults.test_view}, scenario.domains)
    streams = ((benchmark.train_stream, scenario.tasks), (benchmark.test_stream, scenario.groups))
    for stream, parts in streams:
        for experience, part in zip(stream, parts, strict=True):
            assert list(experience.dataset.rows) == part.rows.tolist()
            assert list(experience.dataset.targets) == part.targets.tolist()
            if len(part.rows):
                image, target, row, label = experience.dataset.eval()[-1]
                domain = None if part.domain is None else part.domain[-1:]
                assert torch.equal(image, reader(part.rows[-1:], domain, "test")[0])
                assert (target, row) == (int(part.targets[-1]), int(part.rows[-1]))
                assert (label > 0) <= (scenario.setting == "task")
    back_store, back = from_avalanche(
        benchmark.train_stream, benchmark.test_stream, name="back", online=scenario.online
    )  # fmt: skip
    assert [c for c in check_scenario(back, [back_store.table()]) if not c.ok] == []
    for ours, theirs in ((scenario.tasks, back.tasks), (scenario.groups, back.groups)):
        for part, other in zip(ours, theirs, strict=True):
            assert torch.equal(part.targets, other.targets)
    assert back.setting == scenario.setting


def test_task_labels_and_validation(digits: ImageStore) -> None:
    scenario = digits_scenario(digits, setting="task", val_share="0.25")
    benchmark = to_avalanche(scenario, digits)
    naive, seen = strategy(Naive)
    for index, experience in enumerate(benchmark.train_stream):
        assert experience.task_label == index
        naive.train(experience)
        assert set(column(seen.trained[index], -1)) == {index}
    for index, experience in enumerate(benchmark.test_stream):
        assert experience.task_label == scenario.groups[index].task == index
        assert list(experience.answers) == scenario.groups[index].classes.tolist()
    for experience, task in zip(benchmark.valid_stream, scenario.tasks, strict=True):
        assert task.val is not None
        assert list(experience.dataset.rows) == task.val[0].tolist()
    assert benchmark.n_classes == 10
    assert benchmark.train_stream[2].classes_seen_so_far == {0, 1, 2, 3, 4, 5}


def test_class_setting_has_no_task_labels(digits: ImageStore) -> None:
    benchmark = to_avalanche(digits_scenario(digits), digits)
    assert not hasattr(benchmark.train_stream[1], "task_labels")
    assert set(benchmark.train_stream[1].dataset.targets_task_labels) == {0}
    assert not hasattr(benchmark, "valid_stream")


def test_rehearsal_and_domains_arrive(digits: ImageStore) -> None:
    scenario = digits_scenario(digits, "power-law-digits")
    benchmark = to_avalanche(scenario, digits)
    naive, seen = strategy(Naive)
    last, task = benchmark.train_stream[4], scenario.tasks[4]
    naive.train(last, shuffle=False)
    assert column(seen.trained[0], 2) == task.rows.tolist()
    assert len(set(task.rows.tolist())) < len(task.rows)
    view = scenario.defaults.train_view
    expected = Reader(digits, {"test": view}, scenario.domains)(task.rows, task.domain, "test")
    assert torch.equal(torch.cat([batch[0] for batch in seen.trained[0]]), expected)


def test_an_online_stream_keeps_its_order(digits: ImageStore) -> None:
    scenario = digits_scenario(digits, online="true")
    benchmark = to_avalanche(scenario, digits)
    stream = split_online_stream(benchmark.train_stream, experience_size=10, shuffle=False)
    naive, seen = strategy(Naive)
    for experience in stream:
        naive.train(experience, shuffle=False)
    rows = [row for batches in seen.trained for row in column(batches, 2)]
    assert rows == torch.cat([task.rows for task in scenario.tasks]).tolist()
    assert len(seen.trained) == sum(-(-len(task.rows) // 10) for task in scenario.tasks)


def test_empty_tasks_are_kept() -> None:
    store = make_store()
    base = split_scenario(store)
    empty = torch.empty(0, dtype=torch.int64)
    tasks = (base.tasks[0], base.tasks[1]._replace(rows=empty, targets=empty), base.tasks[2])
    benchmark = to_avalanche(replace(base, tasks=tasks), store)
    assert [len(experience.dataset) for experience in benchmark.train_stream] == [24, 0, 24]
    naive, seen = strategy(Naive, pixels=36)
    for experience in benchmark.train_stream:
        naive.train(experience, shuffle=False)  # torch's random sampler takes no empty data set
    assert [sum(len(batch[1]) for batch in batches) for batches in seen.trained] == [24, 0, 24]


def test_views_are_transform_groups(digits: ImageStore) -> None:
    scenario = digits_scenario(digits)
    dataset = to_avalanche(scenario, digits, train_view="pad_crop(2)", test_view="").train_stream[0].dataset
    row = scenario.tasks[0].rows[0]
    plain = digits.images[row] / 255
    assert torch.equal(dataset.eval()[0][0], plain)
    torch.manual_seed(0)
    assert any(not torch.equal(dataset[0][0], plain) for _ in range(5))


@pytest.mark.parametrize(
    "given", [{}, {"setting": "task", "val_share": "0.2"}, {"online": "true"}, {"train_view": "normalize(0.5,0.5)"}]
)
def test_there_and_back(digits: ImageStore, given: dict[str, str]) -> None:
    view = given.get("train_view")
    scenario = digits_scenario(digits, **{key: value for key, value in given.items() if key != "train_view"})
    benchmark = to_avalanche(scenario, digits, train_view=view)
    store, back = from_avalanche(
        benchmark.train_stream, benchmark.test_stream, getattr(benchmark, "valid_stream", None),
        name="digits", online=scenario.online, class_names=scenario.classes.names,
    )  # fmt: skip
    assert_same_tables(scenario, back)
    assert store.fingerprint == digits.fingerprint
    assert replace(back, id=scenario.id).fingerprint == scenario.fingerprint


def test_domains_become_images_of_their_own() -> None:
    store = make_store()
    base = split_scenario(store)
    turned = torch.ones(24, dtype=torch.int64)
    domains = Domains("permutation", torch.stack([torch.arange(36), torch.arange(36).flip(0)]))
    groups = (base.groups[0]._replace(domain=torch.ones(12, dtype=torch.int64)), *base.groups[1:])
    scenario = replace(
        base, tasks=(base.tasks[0]._replace(domain=turned), *base.tasks[1:]), groups=groups, domains=domains
    )
    benchmark = to_avalanche(scenario, store)
    back_store, back = from_avalanche(benchmark.train_stream, benchmark.test_stream, name="turned")
    task = scenario.tasks[0]
    expected = Reader(store, {"test": ""}, domains)(task.rows, task.domain, "test")
    assert torch.equal(Reader(back_store, {"test": ""})(back.tasks[0].rows, None, "test"), expected)
    assert len(back_store) == len(store)
    assert [c for c in check_scenario(back, [back_store.table()]) if not c.ok] == []


# -- benchmarks that did not come from us ------------------------------------------------------------------------------
def foreign(images: list[Any], targets: list[int]) -> AvalancheDataset:
    samples = list(zip(images, targets, strict=True))
    return AvalancheDataset([samples], data_attributes=[DataAttribute(targets, "targets")])


def pil_images(rows: Tensor, mode: str = "L") -> list[Any]:
    from PIL import Image

    store = make_store()
    return [Image.fromarray(store.images[row, 0].numpy()).convert(mode) for row in rows]


@pytest.mark.parametrize("form", ["L", "RGB", "uint8", "float"])
def test_foreign_benchmarks_come_in(form: str) -> None:
    store = make_store()
    train = [rows_of(store, classes, 0) for classes in ([0, 1], [2, 3])]
    test = [rows_of(store, classes, TEST) for classes in ([0, 1], [2, 3])]

    def dataset(rows: Tensor) -> AvalancheDataset:
        images = {"uint8": list(store.images[rows]), "float": list(store.images[rows] / 255)}.get(form)
        return foreign(pil_images(rows, form) if images is None else images, store.labels[rows].tolist())

    benchmark = benchmark_from_datasets(train=[dataset(r) for r in train], test=[dataset(r) for r in test])
    back_store, back = from_avalanche(benchmark.train_stream, benchmark.test_stream, name="foreign")
    assert back_store.image_shape == ((3 if form == "RGB" else 1), 6, 6)
    for task, rows in zip(back.tasks, train, strict=True):
        assert torch.equal(
            back_store.images[task.rows], store.images[rows].expand(-1, back_store.image_shape[0], -1, -1)
        )
        assert torch.equal(task.targets, store.labels[rows])
    assert back.setting == "class"
    assert [c for c in check_scenario(back, [back_store.table()]) if not c.ok] == []


def test_their_class_incremental_benchmark_comes_in_without_its_transforms() -> None:
    store = make_store()

    def dataset(split: int) -> Any:
        rows = rows_of(store, range(6), split)
        samples = list(zip(pil_images(rows), store.labels[rows].tolist(), strict=True))
        groups = TransformGroups({"train": lambda image: 1 / 0, "eval": lambda image: 1 / 0})
        targets = DataAttribute(store.labels[rows].tolist(), "targets")
        return ClassificationDataset([samples], data_attributes=[targets], transform_groups=groups)

    order = [4, 1, 0, 5, 2, 3]
    benchmark = class_incremental_benchmark(
        {"train": dataset(0), "test": dataset(TEST)}, class_order=order, num_experiences=3
    )
    back_store, back = from_avalanche(benchmark.train_stream, benchmark.test_stream, name="theirs")
    assert [sorted(task.classes.tolist()) for task in back.tasks] == [[1, 4], [0, 5], [2, 3]]
    assert len(back_store) == len(store)
    pixels = {image.numpy().tobytes() for image in back_store.images}
    assert pixels == {image.numpy().tobytes() for image in store.images}
    assert [c for c in check_scenario(back, [back_store.table()]) if not c.ok] == []


def test_frozen_transforms_stay() -> None:
    store = make_store()
    rows = rows_of(store, [0, 1], 0)
    samples = list(zip(store.images[rows], store.labels[rows].tolist(), strict=True))
    turned = ClassificationDataset(
        [samples],
        data_attributes=[DataAttribute(store.labels[rows].tolist(), "targets")],
        transform_groups=TransformGroups({"train": lambda image: image.flip(1), "eval": lambda image: image.flip(1)}),
    ).freeze_transforms()
    stream = benchmark_from_datasets(train=[turned]).train_stream
    back_store, back = from_avalanche(stream, stream, name="turned")
    assert torch.equal(back_store.images[back.tasks[0].rows], store.images[rows].flip(2))


def test_what_cannot_come_in_is_told() -> None:
    store = make_store()
    one = lambda images: benchmark_from_datasets(train=[foreign(images, [0] * len(images))]).train_stream  # noqa: E731
    fine = one(list(store.images[:2]))
    cases = [
        (
            one([store.images[0] / 255 - 0.5]),
            "training experience 0, sample 0: .* in \\[0, 1\\], not torch.float32 from -0.5",
        ),
        (one(["a"]), "must be a PIL image or a tensor"),
        (one([store.images[0], store.images[0, :, :3]]), "sample 1 is 1x3x6, sample 0 is 1x6x6"),
        ([object()], "training experience 0 has no data set with targets"),
    ]
    for train, message in cases:
        with pytest.raises(InputError, match=message):
            from_avalanche(train, fine, name="a")
    labels = DataAttribute([0, 3], "targets_task_labels", use_in_getitem=True)
    mixed = AvalancheDataset(fine[0].dataset, data_attributes=[labels])
    with pytest.raises(InputError, match="mixes task labels 0, 3"):
        from_avalanche(benchmark_from_datasets(train=[mixed]).train_stream, fine, name="a")


@pytest.mark.filterwarnings("ignore:Call to deprecated function update", "ignore:No loggers specified")
def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # their logger writes a file
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/interop.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks[2:]:
        exec(block, names)
    assert [len(task.rows) for task in names["scenario"].tasks] == [288, 288, 291, 288, 283]
