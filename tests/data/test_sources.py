"""The same pixels from every kind of file give the same rows, labels and fingerprint."""

import hashlib
from pathlib import Path

import datafiles
import numpy as np
import pytest
import torch
from PIL import Image

from clbench.data import TEST, TRAIN, ImageStore, load
from clbench.errors import InputError


def reference_rows(data: datafiles.Pixels) -> list[tuple[int, bytes, int, bytes]]:
    """(split, digest, label, pixels) of every row, in the order that the documentation promises."""
    rows = []
    for image, label, test in zip(data.images, data.labels, data.test, strict=True):
        pixels = image.tobytes()
        rows.append((int(test), hashlib.sha256(pixels).digest(), int(label), pixels))
    return sorted(rows)


def check_rows(store: ImageStore, data: datafiles.Pixels) -> None:
    assert store.images.dtype == torch.uint8
    assert store.labels.dtype == torch.int64
    assert store.split.dtype == torch.uint8
    rows = reference_rows(data)
    assert store.split.tolist() == [row[0] for row in rows]
    assert store.labels.tolist() == [row[2] for row in rows]
    assert [image.numpy().tobytes() for image in store.images] == [row[3] for row in rows]


COLOUR = {
    "folder": lambda root, data: datafiles.write_folder(root / "a", data),
    "parquet of png": lambda root, data: datafiles.write_shards(root / "a", data.shuffled(1)),
    "parquet of webp, raw bytes": lambda root, data: datafiles.write_shards(root / "a", data, "WEBP", struct=False),
    "parquet, hub layout": lambda root, data: datafiles.write_shards(root / "a" / "data", data, train_shards=1).parent,
    "cifar-100 folder": lambda root, data: datafiles.write_cifar(root / "a", data.shuffled(2)),
    "cifar-100 archive": lambda root, data: datafiles.write_cifar_tar(root / "a.tar.gz", data),
    "cifar-10 folder": lambda root, data: datafiles.write_cifar(root / "a", data, fine=False),
    "cifar-10 archive": lambda root, data: datafiles.write_cifar_tar(root / "a.tar.gz", data.shuffled(3), fine=False),
    "one parquet with a split column": lambda root, data: datafiles.write_parquet(
        root / "a.parquet", data, extra={"split": ["test" if test else "train" for test in data.test]}
    ),
}
GREY = {
    "folder": lambda root, data: datafiles.write_folder(root / "a", data),
    "idx.gz": lambda root, data: datafiles.write_idx(root / "a", data.shuffled(1)),
    "idx": lambda root, data: datafiles.write_idx(root / "a", data, packed=False),
    "parquet of webp (which has no grey)": lambda root, data: datafiles.write_shards(
        root / "a", data, "WEBP", mode="RGB"
    ),
    "parquet of grey png": lambda root, data: datafiles.write_shards(root / "a", data),
}


@pytest.mark.parametrize("channels", [3, 1])
def test_same_rows_and_fingerprint_from_every_source(channels: int, tmp_path: Path) -> None:
    data = datafiles.make(channels, 32 if channels == 3 else 28)
    fingerprints = {}
    for number, (name, write) in enumerate((COLOUR if channels == 3 else GREY).items()):
        store = load(write(tmp_path / str(number), data))
        check_rows(store, data)
        fingerprints[name] = store.fingerprint
    assert len(set(fingerprints.values())) == 1, fingerprints


def test_fingerprint_sees_pixels_labels_split_and_order(tmp_path: Path) -> None:
    data = datafiles.make()
    seen = {load(datafiles.write_folder(tmp_path / "plain", data)).fingerprint}
    images = data.images.copy()
    images[7, 1, 2, 3] ^= 1
    labels = data.labels.copy()
    labels[7] = (labels[7] + 1) % 3
    test = data.test.copy()
    test[7] = True
    for name, changed in {
        "pixels": datafiles.Pixels(images, data.labels, data.test),
        "labels": datafiles.Pixels(data.images, labels, data.test),
        "split": datafiles.Pixels(data.images, data.labels, test),
    }.items():
        seen.add(load(datafiles.write_folder(tmp_path / name, changed)).fingerprint)
    seen.add(load(tmp_path / "plain", order="source").fingerprint)
    assert len(seen) == 5


def test_source_order_keeps_the_files_order(tmp_path: Path) -> None:
    data = datafiles.make().shuffled(5)
    store = load(datafiles.write_shards(tmp_path / "a", data), order="source")
    expected = np.concatenate([data.part(test=False).images, data.part(test=True).images])
    assert np.array_equal(store.images.numpy(), expected)
    assert store.split.tolist() == [TRAIN] * 18 + [TEST] * 9


def test_coarse_labels_become_parents(tmp_path: Path) -> None:
    data = datafiles.make()
    coarse = [datafiles.COARSE_OF[label] for label in data.labels]
    split = ["test" if test else "train" for test in data.test]
    parquet = datafiles.write_parquet(
        tmp_path / "a.parquet", data, label="fine_label", extra={"coarse_label": coarse, "split": split},
        more={"coarse_label": datafiles.COARSE},
    )  # fmt: skip
    for place in (parquet, datafiles.write_cifar(tmp_path / "b", data)):
        classes = load(place).classes
        assert classes.names == (*datafiles.NAMES, *datafiles.COARSE)
        assert classes.level.tolist() == [1, 1, 1, 0, 0]
        assert classes.parent.tolist() == [3, 3, 4, -1, -1]
    coarse[0] = 1 - coarse[0]
    bad = datafiles.write_parquet(tmp_path / "c.parquet", data, extra={"coarse_label": coarse, "split": split})
    with pytest.raises(InputError, match=r"'ant' has two coarse labels"):
        load(bad)


def test_domains_become_groups(tmp_path: Path) -> None:
    data = datafiles.make()
    domain = (np.arange(len(data.labels)) % 2).tolist()
    split = ["test" if test else "train" for test in data.test]
    path = datafiles.write_parquet(
        tmp_path / "a.parquet", data, extra={"domain": domain, "split": split}, more={"domain": ("photo", "sketch")}
    )
    store = load(path)
    assert store.group_names == store.table().group_names == ("photo", "sketch")
    pictures = {image.tobytes(): set() for image in data.images}
    for image, group in zip(data.images, domain, strict=True):
        pictures[image.tobytes()].add(group)
    assert store.groups is not None
    for image, group in zip(store.images, store.groups.tolist(), strict=True):
        assert group in pictures[image.numpy().tobytes()]
    words = datafiles.write_parquet(
        tmp_path / "b.parquet", data, extra={"domain": [("p", "s")[d] for d in domain], "split": split}
    )
    again = load(words)
    assert again.group_names == ("p", "s")
    assert torch.equal(again.groups, store.groups)


def test_a_source_without_split_gets_the_same_one_from_any_file(tmp_path: Path) -> None:
    data = datafiles.make(train=30, test=0 + 15)
    folder = load(datafiles.write_folder(tmp_path / "a", data, split=False))
    parquet = load(datafiles.write_parquet(tmp_path / "b.parquet", data.shuffled(1)))
    assert folder.fingerprint == parquet.fingerprint
    for label in range(3):
        assert int((folder.split[folder.labels == label] == TEST).sum()) == 3  # 20 % of 15


def test_validation_is_for_testing_only_where_there_is_no_test(tmp_path: Path) -> None:
    data = datafiles.make()
    train, test = data.part(test=False), data.part(test=True)
    for root, name in ((tmp_path / "a", "validation"), (tmp_path / "b", "test")):
        datafiles.write_parquet(root / "train-00000-of-00001.parquet", train)
        datafiles.write_parquet(root / f"{name}-00000-of-00001.parquet", test)
    assert load(tmp_path / "a").fingerprint == load(tmp_path / "b").fingerprint
    datafiles.write_parquet(tmp_path / "b" / "validation-00000-of-00001.parquet", test)
    assert torch.bincount(load(tmp_path / "b").split).tolist() == [18 + 9, 9]


def test_label_names_without_metadata(tmp_path: Path) -> None:
    data = datafiles.make()
    split = ["test" if test else "train" for test in data.test]
    numbers = load(datafiles.write_parquet(tmp_path / "a.parquet", data, metadata=False, extra={"split": split}))
    assert numbers.classes.names == ("0", "1", "2")
    assert numbers.name == "a"
    mean = data.images[~data.test].mean((0, 2, 3)) / 255
    assert numbers.mean == pytest.approx(mean, abs=1e-4)


def test_sizes(tmp_path: Path) -> None:
    data = datafiles.make()
    datafiles.write_folder(tmp_path / "a", data)
    wide = Image.fromarray(np.full((40, 60, 3), (10, 200, 30), np.uint8))
    wide.save(tmp_path / "a" / "train" / "ant" / "wide.png")
    with pytest.raises(InputError, match=r"wide\.png is 40x60 but .*32x32; give one size") as caught:
        load(tmp_path / "a")
    assert "\n" not in str(caught.value)
    store = load(tmp_path / "a", size=16)
    assert store.image_shape == (3, 16, 16)
    flat = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 16, 16)
    assert any(torch.equal(image, flat) for image in store.images)
    assert load(datafiles.write_cifar(tmp_path / "c", data), size=16).image_shape == (3, 16, 16)


def test_tiny_imagenet_layout(tmp_path: Path) -> None:
    data = datafiles.make(side=16)
    wnids = ("n01", "n02", "n03")
    notes = []
    for index, (image, label, test) in enumerate(zip(data.images, data.labels, data.test, strict=True)):
        place = Path("val/images") if test else Path("train", wnids[label], "images")
        path = tmp_path / place / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(datafiles.encode(image))
        if test:
            notes.append(f"{index}.png\t{wnids[label]}\t0\t0\t9\t9")
    (tmp_path / "wnids.txt").write_text("\n".join(reversed(wnids)))
    (tmp_path / "words.txt").write_text("n01\tant, emmet\nn02\tbee\nn03\tcat\nn99\tdog\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(notes))
    store = load(tmp_path)
    check_rows(store, data)
    assert store.classes.names == ("ant, emmet", "bee", "cat")
    (tmp_path / "words.txt").unlink()
    with pytest.raises(InputError, match=r"words\.txt missing"):
        load(tmp_path)


def test_store_moves_and_makes_tables(tmp_path: Path) -> None:
    store = load(datafiles.write_folder(tmp_path / "My Birds", datafiles.make()))
    assert store.name == "my-birds"
    table = store.table()
    assert table.dataset == "my-birds"
    assert table.fingerprint == store.fingerprint
    assert torch.equal(table.labels, store.labels)
    moved = store.to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert store.to("cpu") is store


def test_large_images_are_decoded_in_threads_to_the_same_pixels(tmp_path: Path) -> None:
    data = datafiles.make(side=128, train=80, test=10)  # noise: about 50 kB each as PNG
    check_rows(load(datafiles.write_shards(tmp_path / "a", data)), data)
