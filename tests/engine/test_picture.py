"""The picture of the first batch: what the network got, with its labels, and without any effect on the training."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training_parts import trainer_of

from data import IGNORED, Batch, Normalize
from engine.picture import COUNT, captions, colour, picture, take_sample
from utils.log import MetricsWriter

MEAN, STD = (0.1, 0.5, 0.9, 0.3), (0.2, 0.3, 0.4, 0.5)
CLASSES = ["ant", "bee | wasp", "cat"]


def normalize_of(channels: int, dtype: torch.dtype = torch.float32) -> Normalize:
    return Normalize(MEAN[:channels], STD[:channels], dtype=dtype)


def noise(count: int, channels: int = 3, side: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_pixel_is_there_after_normalisation_and_back(channels):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, channels, 16, 16)
    normalize = normalize_of(channels)
    assert torch.equal(normalize.undo(normalize(pixels)), pixels)


def test_values_that_no_pixel_has():
    images = torch.tensor([-1e9, 1e9, torch.nan]).view(1, 3, 1, 1)
    assert normalize_of(3).undo(images).flatten().tolist() == [0, 255, 0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_stand_side_by_side_in_rows_of_four(channels):
    images, labels = noise(20, channels), torch.arange(20) % 3
    normalize = normalize_of(channels)
    sample = take_sample(normalize(images), labels, normalize, update=1)
    assert len(sample.images) == len(sample.targets) == COUNT == 16
    found = picture(sample)
    assert (found.dtype, found.shape) == (torch.uint8, (3, 4 * 8 + 2, 4 * 8 + 2))
    for i in range(16):
        row, column = 2 + 8 * (i // 4), 2 + 8 * (i % 4)
        shown = images[i, :3].expand(3, -1, -1)
        assert torch.equal(found[:, row : row + 6, column : column + 6], shown), i


def test_a_sample_is_not_changed_by_what_follows():
    normalize, labels = normalize_of(3), torch.tensor([0, 1])
    images = normalize(noise(2))
    sample = take_sample(images, labels, normalize, update=1)
    images.zero_()
    labels.zero_()
    assert torch.equal(sample.images, noise(2))
    assert sample.targets.tolist() == [0, 1]


def test_masks_lie_over_the_images():
    masks = torch.zeros(1, 6, 6, dtype=torch.int64)
    masks[0, 0], masks[0, 1] = 2, IGNORED
    normalize = normalize_of(3)
    sample = take_sample(normalize(noise(1)), masks, normalize, update=1)
    found = picture(sample).float()  # one image has no frame
    image = noise(1)[0].float()
    assert torch.equal(found[:, 1], image[:, 1]), "no class, no colour"
    for row, number in ((0, 2), (2, 0)):
        expected = 0.6 * image[:, row] + 0.4 * torch.tensor(colour(number))[:, None]
        torch.testing.assert_close(found[:, row], expected, atol=0.51, rtol=0)
    assert captions(sample, CLASSES).splitlines()[2:] == ["| 1 | 1 | ant 0.80, cat 0.20 |"]


def test_captions():
    normalize = normalize_of(3)
    hard = take_sample(normalize(noise(5)), torch.tensor([2, 0, 1, 3, 0]), normalize, update=1)
    assert captions(hard, CLASSES).splitlines() == [
        "| row | column | label |",
        "|---|---|---|",
        "| 1 | 1 | cat |",
        "| 1 | 2 | ant |",
        "| 1 | 3 | bee \\| wasp |",
        "| 1 | 4 | 3 |",
        "| 2 | 1 | ant |",
    ]
    shares = torch.tensor([[0.97, 0.02, 0.01], [0.25, 0.0, 0.75]])
    mixed = take_sample(normalize(noise(2)), shares, normalize, update=1)
    assert captions(mixed, CLASSES).splitlines()[2:] == ["| 1 | 1 | ant 0.97 |", "| 1 | 2 | cat 0.75, ant 0.25 |"]


class Brighter:
    """A batch augmentation that draws, and makes all images white in their upper half."""

    soft_targets = False

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, *, epoch: int, step: int):
        images[:, :, :3] = 9
        return images + 0 * torch.rand(1), labels


def trained(folder: Path | None, updates: int = 5) -> nn.Module:
    """Trains a small network for an epoch; its picture goes to the folder."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 3))
    writer = MetricsWriter(folder)
    trainer = trainer_of(
        network,
        metrics=writer,
        print_freq=2,
        normalize=normalize_of(3),
        batch_augmentation=Brighter(),
        classes=CLASSES,
    )
    images = noise(updates * 8).split(8)
    trainer.train_epoch(Batch(part, torch.arange(8) % 3, torch.arange(8), []) for part in images)
    writer.close()
    return network


def test_a_run_shows_its_first_batch_as_the_network_got_it(tmp_path):
    trained(tmp_path)
    board = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0})
    board.Reload()
    (event,) = board.Images("batch/images")
    assert event.step == 1
    shown = torch.tensor(list(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB").get_flattened_data()))
    shown = shown.view(event.height, event.width, 3).permute(2, 0, 1)[:, 2:8, 2:8]
    assert (shown[:, :3] == 255).all()
    assert torch.equal(shown[:, 3:].byte(), noise(40)[0, :, 3:])
    (text,) = board.Tensors("batch/labels/text_summary")
    assert "| 1 | 2 | bee \\| wasp |" in text.tensor_proto.string_val[0].decode()


def test_a_run_without_a_board_computes_the_same(tmp_path):
    shown, plain = trained(tmp_path), trained(None)
    assert all(torch.equal(a, b) for a, b in zip(shown.parameters(), plain.parameters(), strict=True))
    assert "batch" not in (tmp_path / "metrics.jsonl").read_text()
