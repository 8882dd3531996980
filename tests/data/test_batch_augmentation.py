import numpy as np
import pytest
import torch
from settings import settings

from data import ERASING_MODES, MIXUP_MODES, PRESETS, build_batch_augmentation

CLASSES = 5


def batch(count: int = 8, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images whose pixels all have the value of their position in the batch, and cyclic labels."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 3, side, side).clone()
    return images, torch.arange(count) % CLASSES


def build(*, batch_size: int = 8, label_smoothing: float = 0.1, seed: int = 0, rank: int = 0, **keys):
    """Builds with these keys of the section AUG, and without erasing where none is asked for."""
    opts = " ".join(f"AUG.{key} {value}" for key, value in ({"REPROB": 0} | keys).items())
    return build_batch_augmentation(
        settings(opts).AUG,
        num_classes=CLASSES,
        batch_size=batch_size,
        label_smoothing=label_smoothing,
        seed=seed,
        rank=rank,
    )


def smoothed(labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES


def test_nothing_asked_for_is_none():
    assert build() is None
    assert build(batch_size=7) is None


@pytest.mark.parametrize("mode", MIXUP_MODES)
@pytest.mark.parametrize("keys", [{"MIXUP": 0.4}, {"CUTMIX": 1.0}, {"MIXUP": 0.4, "CUTMIX": 1.0}])
def test_targets_are_distributions_that_follow_the_pixels(keys, mode):
    augment = build(**keys, MIXUP_MODE=mode, label_smoothing=0.1)
    assert augment.soft_targets
    for step in range(20):
        images, labels = batch()
        partners = labels.flip(0)
        mixed, targets = augment(images, labels, epoch=0, step=step)
        assert targets.shape == (8, CLASSES)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        position = torch.arange(8.0)
        own_share = (mixed.mean((1, 2, 3)) - position.flip(0)) / (position - position.flip(0))
        expected = own_share[:, None] * smoothed(labels, 0.1) + (1 - own_share[:, None]) * smoothed(partners, 0.1)
        torch.testing.assert_close(targets, expected, atol=1e-5, rtol=0)


def test_mixup_shares_follow_the_beta_distribution():
    augment = build(MIXUP=0.4, label_smoothing=0.0)
    shares = []
    for step in range(2000):
        images, labels = batch(2, side=1)
        shares.append(1 - float(augment(images, labels, epoch=0, step=step)[0][0].mean()))
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert abs(np.var(shares) - 1 / (4 * (2 * 0.4 + 1))) < 0.01  # of Beta(a, a)


def test_cutmix_pastes_boxes_whole():
    augment = build(CUTMIX=1.0)
    for step in range(20):
        images, labels = batch()
        mixed, _ = augment(images, labels, epoch=0, step=step)
        for position, image in enumerate(mixed):
            assert set(image.unique().tolist()) <= {position, 7 - position}


def test_cutmix_minmax_bounds_the_box():
    augment = build(CUTMIX_MINMAX="0.25,0.5")
    areas = []
    for step in range(100):
        images, labels = batch()
        areas.append(float((augment(images, labels, epoch=0, step=step)[0][0, 0] == 7).sum()))
    assert min(areas) >= 4 * 4
    assert max(areas) < 8 * 8


def test_both_switch_and_may_leave_a_batch_alone():
    augment = build(MIXUP=1.0, CUTMIX=1.0, MIXUP_PROB=0.5, MIXUP_SWITCH_PROB=0.25, label_smoothing=0.2)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for step in range(1000):
        images, labels = batch(4, side=8)
        mixed, targets = augment(images, labels, epoch=0, step=step)
        values = mixed[0].unique()
        if len(values) == 1 and values[0] == 0:
            kinds["none"] += 1
            torch.testing.assert_close(targets, smoothed(labels, 0.2))
        else:
            kinds["cutmix" if set(values.tolist()) <= {0.0, 3.0} else "mixup"] += 1
    assert 450 < kinds["none"] < 560
    assert 320 < kinds["mixup"] < 430
    assert 80 < kinds["cutmix"] < 170


def test_erasing_keeps_labels_and_obeys_its_probability():
    augment = build(REPROB=0.25, REMODE="const", batch_size=7)
    assert not augment.soft_targets
    erased, fractions = 0, []
    for step in range(200):
        images, labels = torch.ones(7, 3, 32, 32), torch.arange(7) % CLASSES
        images, targets = augment(images, labels, epoch=0, step=step)
        assert targets is labels
        zeros = (images == 0).float().mean((1, 2, 3))
        erased += int((zeros > 0).sum())
        fractions += zeros[zeros > 0].tolist()
    assert 0.20 < erased / 1400 < 0.30
    assert min(fractions) > 0.01
    assert max(fractions) < 0.4


def test_erasing_modes():
    for remode in ERASING_MODES:
        images, _ = build(REPROB=1.0, REMODE=remode)(torch.full((8, 3, 32, 32), 9.0), torch.zeros(8), epoch=0, step=0)
        for image in images:
            erased = image[image != 9]
            values = {"const": 1, "rand": 3, "pixel": len(erased)}[remode]
            assert len(erased.unique()) == values > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_without_erasing(preset):
    assert build(PRESET=preset, REPROB=1) is None
    images, labels = torch.full((8, 3, 16, 16), 9.0), torch.zeros(8, dtype=torch.long)
    assert (build(PRESET=preset, REPROB=1, MIXUP=0.4)(images, labels, epoch=0, step=0)[0] == 9).all()


@pytest.mark.parametrize("keys", [{"MIXUP": 0.4, "CUTMIX": 1.0}, {"REPROB": 0.5}, {"MIXUP": 1.0, "REPROB": 0.5}])
def test_draws_depend_on_the_key_alone(keys):
    def draw(epoch: int, step: int, **key: int) -> bytes:
        images, labels = batch()
        images, targets = build(**keys, **key)(images, labels, epoch=epoch, step=step)
        return images.numpy().tobytes() + targets.numpy().tobytes()

    first = draw(2, 7)
    torch.rand(3), np.random.rand(3)
    assert draw(2, 7) == first
    others = [draw(2, 8), draw(3, 7), draw(2, 7, seed=1), draw(2, 7, rank=1)]
    assert len({first, *others}) == 5


def test_global_generators_go_on_undisturbed():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    build(MIXUP=0.4, CUTMIX=1.0, REPROB=1.0)(*batch(), epoch=0, step=0)
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_on_a_gpu_depend_on_the_key_alone():
    def draw() -> list[torch.Tensor]:
        images, labels = batch()
        augment = build(MIXUP=0.4, CUTMIX=1.0, REPROB=0.5)
        return [result.cpu() for result in augment(images.cuda(), labels.cuda(), epoch=0, step=0)]

    torch.cuda.manual_seed(0)
    expected = torch.rand(4, device="cuda")
    first = draw()
    torch.cuda.manual_seed(0)
    for result, again in zip(first, draw(), strict=True):
        assert torch.equal(result, again)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


@pytest.mark.parametrize("minmax", ["0.5, 0.51", "0.0, 0.05"])
def test_bounds_of_the_box_must_differ_by_a_pixel(minmax):
    """Whether they do depends on the size of the images."""
    augment = build(CUTMIX_MINMAX=minmax.replace(" ", ""))
    with pytest.raises(ValueError, match=rf"^AUG.CUTMIX_MINMAX is \[{minmax}\]: .* of 16 pixels"):
        augment(*batch(), epoch=0, step=0)
    augment(*batch(side=100), epoch=0, step=0)


def test_the_widest_bounds_of_the_box():
    augment = build(CUTMIX_MINMAX="0,1")
    for step in range(50):
        augment(*batch(side=2), epoch=0, step=step)


@pytest.mark.parametrize("keys", [{"MIXUP": 0.4}, {"CUTMIX": 1.0}, {"CUTMIX_MINMAX": "0.2,0.8"}])
def test_odd_batches_cannot_be_mixed(keys):
    with pytest.raises(ValueError, match="DATA.BATCH_SIZE 7 is odd"):
        build(**keys, batch_size=7)


@pytest.mark.parametrize(
    "keys",
    [
        {"CUTMIX_MINMAX": "0,1"},
        {"MIXUP": 1.0, "MIXUP_PROB": 0},
        {"MIXUP": 1.0, "MIXUP_PROB": 1},
        {"MIXUP": 1.0, "CUTMIX": 1.0, "MIXUP_SWITCH_PROB": 0},
        {"MIXUP": 1.0, "CUTMIX": 1.0, "MIXUP_SWITCH_PROB": 1},
        {"MIXUP": 1.0, "label_smoothing": 0},
        {"REPROB": 1},
        {"REPROB": 0.5, "RECOUNT": 1},
    ],
    ids=str,
)
def test_the_limits_of_a_range_belong_to_it(keys):
    images, targets = build(**keys)(*batch(), epoch=0, step=0)
    assert images.shape == (8, 3, 16, 16)
    assert targets.shape == ((8,) if "REPROB" in keys else (8, CLASSES))


def test_the_schema_erases_once_with_noise_and_rank_0_is_the_default():
    told = build(REPROB=0.5, RECOUNT=1, REMODE="pixel")
    cfg = settings("AUG.REPROB 0.5").AUG
    default = build_batch_augmentation(cfg, num_classes=CLASSES, batch_size=8, label_smoothing=0.1, seed=0)
    (images, _), (expected, _) = (augment(*batch(), epoch=1, step=2) for augment in (default, told))
    assert torch.equal(images, expected)


def test_recount_is_the_most_rectangles_of_an_image():
    images, _ = build(REPROB=1, REMODE="rand", RECOUNT=3)(torch.full((8, 3, 32, 32), 9.0), None, epoch=0, step=0)
    colours = [len({*map(tuple, image.flatten(1).T.tolist())} - {(9.0, 9.0, 9.0)}) for image in images]
    assert min(colours) >= 1
    assert 1 < max(colours) <= 3
