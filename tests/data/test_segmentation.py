"""Cityscapes from its folders, and transforms that treat image and mask as one."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from settings import settings

from data import (
    CITYSCAPES,
    IGNORED,
    CityscapesSource,
    MaskedDataset,
    build_eval_loader,
    build_train_loader,
    segmentation_eval_transform,
    segmentation_train_transform,
)
from data.decode import MODES
from data.segmentation import RandomScale
from utils.seed import keyed_rng

ROAD, PERSON, CAR = 0, 11, 13  # training ids


@pytest.fixture
def own_folder(cityscapes_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(cityscapes_folder, tmp_path / "own")


def test_the_nineteen_classes_have_the_published_label_ids() -> None:
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert list(CITYSCAPES.values()) == ids
    assert (list(CITYSCAPES)[ROAD], list(CITYSCAPES)[PERSON], list(CITYSCAPES)[CAR]) == ("road", "person", "car")


def test_images_of_all_cities_come_with_their_own_masks(cityscapes_folder: Path) -> None:
    source = CityscapesSource(cityscapes_folder, "train")
    assert len(source) == 12
    assert {Path(source.locate(i)).parent.name for i in range(12)} == {"aachen", "bochum"}
    for index in range(12):
        image, mask = source.load(index)
        pixels = np.asarray(image)
        assert set(np.unique(mask)) == {ROAD, PERSON, CAR, IGNORED}
        assert (mask[:2] == IGNORED).all()
        assert pixels[mask == CAR].mean(0) == pytest.approx([200, 40, 40], abs=3)
        assert pixels[mask == PERSON].mean(0) == pytest.approx([40, 60, 200], abs=3)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_padded_with_their_mean(channels: int) -> None:
    mean = (0.1, 0.2, 0.3, 0.4)[:channels]
    image = Image.new(MODES[channels], (8, 8))
    transform = segmentation_train_transform((32, 32), (0.9, 1.1), mean)
    pixels, mask = transform(image, np.zeros((8, 8), dtype=np.uint8), random.Random(0))
    assert pixels.shape == (channels, 32, 32)
    padding = torch.tensor([round(255 * value) for value in mean])
    assert torch.equal(pixels[:, mask == IGNORED].unique(dim=1)[:, 0].long(), padding)
    whole, _ = segmentation_eval_transform((16, 16))(image, np.zeros((8, 8), dtype=np.uint8), random.Random(0))
    assert whole.shape == (channels, 16, 16)


def test_label_ids_become_training_ids(own_folder: Path) -> None:
    path = next((own_folder / "gtFine/val/lindau").glob("*000000_*"))
    Image.fromarray(np.arange(256, dtype=np.uint8).repeat(24).reshape(64, 96)).save(path)
    _, mask = CityscapesSource(own_folder, "val").load(0)
    found = {label_id: int(training_id) for label_id, training_id in zip(range(256), mask.reshape(-1, 24)[:, 0])}  # noqa: B905
    known = {label_id: number for number, label_id in enumerate(CITYSCAPES.values())}
    assert found == {label_id: known.get(label_id, IGNORED) for label_id in range(256)}


def test_missing_folders_and_masks_are_named(own_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no images at .*leftImg8bit/val/<city>/\*_leftImg8bit.png"):
        CityscapesSource(tmp_path, "val")
    masks = sorted((own_folder / "gtFine/val/lindau").iterdir())
    masks[2].unlink()
    with pytest.raises(ValueError, match=f"1 of 4 images have no mask, the first is .*{masks[2].name}"):
        CityscapesSource(own_folder, "val")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((64, 96, 3), dtype=np.uint8), "holds RGB pixels instead of 8-bit label ids"),
        (np.zeros((32, 96), dtype=np.uint8), "its mask is 32x96, the image 64x96"),
    ],
)
def test_a_mask_that_does_not_fit_is_an_unreadable_image(own_folder: Path, mask: np.ndarray, message: str) -> None:
    path = next((own_folder / "gtFine/val/lindau").glob("*000000_*"))
    Image.fromarray(mask).save(path)
    source = CityscapesSource(own_folder, "val")
    with pytest.raises(ValueError, match=message):
        source.load(0)
    cfg = settings("DATA.BATCH_SIZE 2 DATA.NUM_WORKERS 0").DATA
    loader = build_eval_loader(source, segmentation_eval_transform(), cfg, dataset=MaskedDataset)
    assert [len(batch.unreadable) for batch in loader] == [1, 0]


def test_evaluation_sees_every_image_whole(cityscapes_folder: Path) -> None:
    source = CityscapesSource(cityscapes_folder, "val")
    cfg = settings("DATA.BATCH_SIZE 3 DATA.NUM_WORKERS 0").DATA
    loader = build_eval_loader(source, segmentation_eval_transform(), cfg, dataset=MaskedDataset)
    first, second = loader
    assert (first.images.shape, first.labels.shape) == ((3, 3, 64, 96), (3, 64, 96))
    assert (first.images.dtype, first.labels.dtype) == (torch.uint8, torch.int64)
    assert second.indices.tolist() == [3]
    image, mask = source.load(3)
    assert torch.equal(second.images[0], torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert torch.equal(second.labels[0], torch.from_numpy(mask).long())


@pytest.mark.parametrize("size", [(32, 48), (128, 64), (1, 1)])
def test_an_evaluation_at_a_size_of_its_own(cityscapes_folder: Path, size: tuple[int, int]) -> None:
    """The image is interpolated bilinearly; the mask keeps its labels, each that of the nearest pixel."""
    image, mask = CityscapesSource(cityscapes_folder, "val").load(0)
    pixels, labels = segmentation_eval_transform(size)(image, mask, random)
    assert (pixels.shape, pixels.dtype) == ((3, *size), torch.uint8)
    assert (labels.shape, labels.dtype) == (size, torch.int64)
    expected = torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert (pixels.int() - expected.int()).abs().max() <= 1  # by the rounding of its two passes
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, mask.shape, strict=True))
    assert np.array_equal(labels.numpy(), mask[rows][:, columns])


def test_an_evaluation_at_the_size_of_the_image_changes_nothing(cityscapes_folder: Path) -> None:
    sample = CityscapesSource(cityscapes_folder, "val").load(0)
    whole, resized = (segmentation_eval_transform(size)(*sample, random) for size in (None, (64, 96)))
    assert all(map(torch.equal, whole, resized))


def test_augmentation_moves_image_and_mask_alike(cityscapes_folder: Path) -> None:
    source, transform = CityscapesSource(cityscapes_folder, "train"), segmentation_train_transform((48, 80))
    agreeing, all_pixels, flips = 0, 0, set()
    for index in range(12):
        with keyed_rng(0, 0, index):
            image, mask = transform(*source.load(index), random)
        assert (image.shape, mask.shape) == ((3, 48, 80), (48, 80))
        assert set(mask.unique().tolist()) <= {ROAD, PERSON, CAR, IGNORED}
        red_over_blue, shapes = image[0].float() - image[2], (mask == CAR) | (mask == PERSON)
        agreeing += int(((red_over_blue > 80) & (mask == CAR) | (red_over_blue < -80) & (mask == PERSON)).sum())
        all_pixels += int(shapes.sum())
        columns = [(mask == label).nonzero()[:, 1].float().mean() for label in (CAR, PERSON)]
        flips.add(bool(columns[0] > columns[1]))  # the car is to the left of the person
    assert agreeing > 0.85 * all_pixels > 1000  # at their borders the image is interpolated and the mask is not
    assert flips == {True, False}


def test_what_lies_outside_is_the_mean_colour_and_not_counted(cityscapes_folder: Path) -> None:
    image, mask = segmentation_train_transform((128, 192), scale=(0.5, 0.5))(
        *CityscapesSource(cityscapes_folder, "train").load(0), random
    )
    assert (mask != IGNORED).sum() <= 32 * 48
    outside = image[:, (image == torch.tensor([124, 116, 104])[:, None, None]).all(0)]
    assert outside.shape[1] >= 128 * 192 - 32 * 48
    assert (mask[:8] == IGNORED).all() or (mask[-8:] == IGNORED).all()


def test_the_scale_is_uniform_in_its_range() -> None:
    scale, image, mask = RandomScale(0.5, 2.0), torch.zeros(3, 40, 80), torch.zeros(1, 40, 80)
    heights = []
    for index in range(200):
        with keyed_rng(index):
            scaled, labels = scale(image, mask)
        assert scaled.shape[1:] == labels.shape[1:]
        assert scaled.shape[2] == pytest.approx(2 * scaled.shape[1], abs=1)
        heights.append(scaled.shape[1])
    assert 20 <= min(heights) < 23
    assert 77 < max(heights) <= 80
    assert np.mean(heights) == pytest.approx(50, abs=3)


def test_augmentation_depends_on_seed_epoch_and_image_alone(cityscapes_folder: Path) -> None:
    def epoch(workers: int, number: int) -> dict[int, torch.Tensor]:
        loader = build_train_loader(
            CityscapesSource(cityscapes_folder, "train"),
            segmentation_train_transform((32, 32)),
            settings(f"DATA.BATCH_SIZE 4 DATA.NUM_WORKERS {workers}").DATA,
            seed=0,
            dataset=MaskedDataset,
        )
        loader.set_position(number)
        return {int(i): mask for batch in loader for i, mask in zip(batch.indices, batch.labels, strict=True)}

    first, again, next_one = epoch(0, 0), epoch(2, 0), epoch(0, 1)
    assert sorted(first) == list(range(12))
    assert all(torch.equal(first[i], again[i]) for i in first)
    assert not all(torch.equal(first[i], next_one[i]) for i in first)
