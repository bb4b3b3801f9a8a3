"""What a domain does to stored images: permutations, rotations, overlays."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_survives_kill, equal, learner_for, make_store, run, split_scenario

from clbench.data import ImageStore, Reader
from clbench.data.classes import ClassTable
from clbench.data.reader import overlay, permute, rotate
from clbench.errors import InputError
from clbench.learner.learner import Learner
from clbench.methods.er import ER, ERConfig
from clbench.rng import generator
from clbench.scenarios.model import Domains


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator(0, "images", *shape), dtype=torch.uint8)


def store_of(images: torch.Tensor) -> ImageStore:
    number = len(images)
    classes = ClassTable(("a",), torch.zeros(1, dtype=torch.int64), torch.full((1,), -1))
    labels, split = torch.zeros(number, dtype=torch.int64), torch.zeros(number, dtype=torch.uint8)
    return ImageStore(images, labels, split, classes, "drawn", "0" * 64)


def turned(images: torch.Tensor, *degrees: int) -> torch.Tensor:
    return rotate(images, torch.tensor(degrees)[:, None])


# -- rotation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [1, 2, 7, 8, 28, 32, 105])
def test_quarter_turns_of_squares_are_exact(side: int) -> None:
    images = draw(3, 3, side, side)
    for quarters in range(-4, 9):
        expected = torch.rot90(images, quarters, (2, 3))
        assert torch.equal(turned(images, *[90 * quarters] * 3), expected), f"{90 * quarters} degrees"


def test_positive_angles_turn_anticlockwise() -> None:
    """As one sees it: what points to the right points up after 90 degrees."""
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 8] = 200
    assert turned(image, 90)[0, 0, 0, 4] == 200
    assert turned(image, -90)[0, 0, 8, 4] == 200
    half = turned(image, 45)[0, 0].float()
    assert half[1:3, 6:8].sum() > 0.9 * half.sum() > 0


@given(st.sampled_from([(4, 7), (7, 4), (6, 10), (1, 5)]))
def test_oblong_images(size: tuple[int, int]) -> None:
    images = draw(2, 1, *size)
    assert torch.equal(turned(images, 0, 360), images)
    assert torch.equal(turned(images, 180, -180), images.flip(2, 3))


def test_a_quarter_turn_of_an_oblong_image_keeps_its_middle_undistorted() -> None:
    image = draw(1, 1, 4, 8)
    result = turned(image, 90)[0, 0]
    assert torch.equal(result[:, 2:6], torch.rot90(image[0, 0, :, 2:6]))
    assert not result[:, :2].any()
    assert not result[:, 6:].any(), "what comes in from outside is 0"


def naive(image: torch.Tensor, degrees: int) -> torch.Tensor:
    """(H, W) turned pixel by pixel: where a pixel's centre comes from, and the four pixels around that point."""
    height, width = image.shape
    angle = math.radians(degrees)
    out = torch.zeros(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2, (height - 1) / 2 - row  # from the centre, y upwards
            from_x = math.cos(angle) * x + math.sin(angle) * y + (width - 1) / 2
            from_y = (height - 1) / 2 - (math.cos(angle) * y - math.sin(angle) * x)
            for r in (math.floor(from_y), math.floor(from_y) + 1):
                for c in (math.floor(from_x), math.floor(from_x) + 1):
                    if 0 <= r < height and 0 <= c < width:
                        out[row, column] += (1 - abs(from_y - r)) * (1 - abs(from_x - c)) * image[r, c].item()
    return out


@given(st.integers(-720, 720), st.sampled_from([(8, 8), (5, 5), (4, 7), (9, 3)]))
def test_rotation_is_bilinear_about_the_centre(degrees: int, size: tuple[int, int]) -> None:
    images = draw(1, 1, *size)
    assert (turned(images, degrees)[0, 0].double() - naive(images[0, 0], degrees)).abs().max() <= 0.5 + 1e-6


def test_an_image_turns_the_same_in_any_batch() -> None:
    images, degrees = draw(33, 3, 28, 28), torch.arange(33)[:, None] * 11
    together = rotate(images, degrees)
    assert torch.equal(together, torch.cat([rotate(images[i : i + 1], degrees[i : i + 1]) for i in range(33)]))
    assert torch.equal(together.flip(0), rotate(images.flip(0), degrees.flip(0)))


# -- overlay and permutation -------------------------------------------------------------------------------------
@given(st.integers(1, 3), st.data())
def test_overlay_sets_what_it_names_and_keeps_the_rest(channels: int, data: st.DataObject) -> None:
    images = draw(4, channels, 3, 5)
    values = torch.tensor([data.draw(st.lists(st.integers(-1, 255), min_size=15, max_size=15)) for _ in range(4)])
    result = overlay(images, values)
    assert result.dtype == torch.uint8
    for channel in range(channels):
        flat, before = result[:, channel].flatten(1).long(), images[:, channel].flatten(1).long()
        assert torch.equal(flat, torch.where(values == -1, before, values))


def test_the_ends_of_an_overlay() -> None:
    image = draw(1, 1, 1, 3)
    assert torch.equal(overlay(image, torch.full((1, 3), -1)), image), "-1 leaves every pixel"
    assert overlay(image, torch.tensor([[0, 255, -1]])).flatten().tolist() == [0, 255, int(image[0, 0, 0, 2])]


@given(st.permutations(range(12)))
def test_permutations_can_be_undone(order: list[int]) -> None:
    images = draw(2, 3, 3, 4)
    source = torch.tensor([order, order])
    moved = permute(images, source)
    assert torch.equal(moved.flatten(2), images.flatten(2)[:, :, order])
    assert torch.equal(permute(moved, source.argsort(1)), images)


# -- through the reader ------------------------------------------------------------------------------------------
TABLES = {
    "rotation": torch.tensor([[0], [90], [33]]),
    "overlay": torch.stack([torch.full((64,), -1), torch.arange(64), torch.full((64,), 255)]),
    "permutation": torch.stack([torch.arange(64), torch.arange(64).flip(0), torch.arange(64).view(8, 8).T.flatten()]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_each_row_is_seen_through_its_own_domain(kind: str) -> None:
    store = store_of(draw(5, 3, 8, 8))
    reader = Reader(store, {"test": ""}, Domains(kind, TABLES[kind]))
    rows, domain = torch.tensor([4, 0, 4, 2]), torch.tensor([2, 1, 0, 1])
    seen = reader(rows, domain, "test")
    alone = [reader(rows[i : i + 1], domain[i : i + 1], "test") for i in range(4)]
    assert torch.equal(seen, torch.cat(alone))
    plain = store.images.float() / 255
    assert torch.equal(seen[2], plain[4]), "the first domain of each table leaves images as they are"
    assert not torch.equal(seen[0], plain[4])
    assert torch.equal(reader(rows, None, "test"), plain[rows])
    assert torch.equal(store.images, draw(5, 3, 8, 8)), "the store is not written to"


def test_the_domain_comes_before_the_view() -> None:
    store = store_of(draw(2, 1, 8, 8))
    reader = Reader(store, {"test": "center_crop(4)"}, Domains("rotation", torch.tensor([[90]])))
    rows, domain = torch.tensor([0, 1]), torch.tensor([0, 0])
    expected = torch.rot90(store.images, 1, (2, 3))[:, :, 2:6, 2:6].float() / 255
    assert torch.equal(reader(rows, domain, "test"), expected)


@pytest.mark.parametrize("kind", TABLES)
def test_no_host_read(kind: str) -> None:
    hostreads = pytest.importorskip("clbench.learner.hostreads")
    reader = Reader(store_of(draw(3, 1, 8, 8)), {"test": ""}, Domains(kind, TABLES[kind]))
    rows, domain = torch.tensor([1, 2]), torch.tensor([1, 2])
    reader(rows, domain, "test")
    with hostreads.forbid_host_reads():
        reader(rows, domain, "test")


SMALL = {
    "rotation": torch.tensor([[0], [45], [90]]),
    "overlay": torch.stack([torch.full((36,), -1), torch.arange(36) % 7 * 40 - 1, torch.arange(36) % 5 * 60 - 1]),
    "permutation": torch.stack([torch.arange(36), torch.arange(36).flip(0), torch.arange(36).roll(7)]),
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_killed_run_resumes_to_the_bit(kind: str) -> None:
    """Training, replay and evaluation all read through the domains."""
    store = make_store()
    plain = split_scenario(store)
    tasks = tuple(t._replace(domain=torch.full_like(t.rows, i)) for i, t in enumerate(plain.tasks))
    groups = tuple(g._replace(domain=torch.full_like(g.rows, i)) for i, g in enumerate(plain.groups))
    scenario = replace(plain, domains=Domains(kind, SMALL[kind]), tasks=tasks, groups=groups)

    def make(**changes: object) -> Learner:
        return learner_for(scenario, ER, store=store, config=ERConfig(capacity=8, replay_batch_size=4), **changes)

    whole = assert_survives_kill(make, at_most=4)
    undone = run(learner_for(plain, ER, store=store, config=ERConfig(capacity=8, replay_batch_size=4)))
    weights = [learner.method.state_dict() for learner in (whole, undone)]
    assert not equal(*weights), "the domains make a difference"


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (Domains("overlay", torch.zeros(2, 60, dtype=torch.int64)), "changes images of 60 pixels, but those of drawn"),
        (Domains("rotation", torch.zeros(2, 64, dtype=torch.int64)), "changes images of 64 pixels"),
        (Domains("permutation", torch.arange(64)), "changes images of 64 pixels"),
        (Domains("overlay", torch.full((1, 64), 256)), "overlay table must hold numbers from -1 to 255 only"),
        (Domains("overlay", torch.full((1, 64), -2)), "overlay table must hold numbers from -1 to 255 only"),
        (Domains("permutation", torch.arange(1, 65)[None]), "permutation table must hold numbers from 0 to 63 only"),
        (Domains("rotation", torch.zeros(2, 1)), "must be int64, not torch.float32"),
        (Domains("rotations", torch.zeros(2, 1, dtype=torch.int64)), "did you mean 'rotation'"),
    ],
)
def test_tables_that_do_not_fit(domains: Domains, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reader(store_of(draw(2, 1, 8, 8)), {"test": ""}, domains)
