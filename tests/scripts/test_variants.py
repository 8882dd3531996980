"""Short trainings along every branch: recipes, precisions, optimizers, schedules, data formats, architectures."""

import re

import pytest
import torch
from script_runs import same

ARCH = "RepMLPNet-Digits"
TINY = "DATA.IMG_SIZE 16 DATA.NUM_WORKERS 0 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 PRINT_FREQ 1"
# The published command, but for the launcher, the data, the network and the length.
PUBLISHED = (
    "--arch {arch} --batch-size {batch} --data-path {data} --opts TRAIN.EPOCHS 2 TRAIN.BASE_LR 0.001 "
    "TRAIN.WEIGHT_DECAY 0.1 TRAIN.OPTIMIZER.NAME adamw TRAIN.OPTIMIZER.MOMENTUM 0.9 TRAIN.WARMUP_LR 5e-7 "
    "TRAIN.MIN_LR 0.0 TRAIN.WARMUP_EPOCHS 1 AUG.PRESET raug15 AUG.MIXUP 0.4 AUG.CUTMIX 1.0 DATA.IMG_SIZE 16"
)


def command(images: object, options: str = "", *, flags: str = "", arch: str = ARCH, batch: int = 8) -> str:
    return f"--arch {arch} --data-path {images} --batch-size {batch} {flags} --opts {TINY} {options}"


def finished(run, images: int = 10) -> None:
    """Asserts what every training leaves: finite losses, an evaluation of all images, loadable weights."""
    assert run.records("train")
    assert all(0 < record["loss"] < 100 and record["grad_norm"] > 0 for record in run.records("train"))
    assert [record["images"] for record in run.records("eval")][-1] == images
    assert all(value.isfinite().all() for value in run.weights().values())


def test_the_published_command(images, train):
    run = train(PUBLISHED.format(arch=ARCH, batch=8, data=images) + " PRINT_FREQ 1")
    finished(run)
    rates = [record["lr"] for record in run.records("train")]
    # Global batch 8: rates are 8 / 256 of what is written; three updates of warm-up, then cosine from the third.
    low, high = 5e-7 * 8 / 256, 0.001 * 8 / 256
    assert rates[:3] == pytest.approx([low + (high - low) * t / 3 for t in range(3)], rel=1e-12)
    assert rates[3] == pytest.approx(high / 2, rel=1e-12)
    assert torch.load(run.folder / "latest.pth", weights_only=True)["meta"]["num_classes"] == 2


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("", "--amp bf16"),
        ("TRAIN.OPTIMIZER.NAME sgd TRAIN.BASE_LR 0.1", ""),
        ("TRAIN.OPTIMIZER.NAME sgd TRAIN.OPTIMIZER.MOMENTUM 0", ""),
        ("TRAIN.LR_SCHEDULER.NAME linear", ""),
        ("TRAIN.LR_SCHEDULER.NAME step TRAIN.LR_SCHEDULER.DECAY_EPOCHS 1", ""),
        ("MODEL.DROP_PATH 0.2 MODEL.LABEL_SMOOTHING 0", ""),
        ("AUG.MIXUP 0.4 AUG.CUTMIX 1.0 AUG.MIXUP_MODE elem", ""),
        ("AUG.CUTMIX_MINMAX 0.2,0.8", ""),
        ("AUG.AUTO_AUGMENT none AUG.REPROB 1.0 AUG.REMODE const", ""),
        ("AUG.PRESET none TRAIN.CLIP_GRAD 0", ""),
        ("TEST.CROP True DATA.INTERPOLATION random", ""),
        ("DATA.TEST_BATCH_SIZE 3 DATA.PIN_MEMORY True", ""),
        ("DETERMINISTIC True", ""),
    ],
    ids=lambda value: value or "-",
)
def test_options(images, train, options, flags):
    finished(train(command(images, options, flags=flags)))


def test_an_unmixed_odd_batch_trains(images, train):
    finished(train(command(images, batch=5)))


def test_recomputed_activations_change_nothing(images, train):
    plain = train(command(images, "MODEL.DROP_PATH 0.2"))
    again = train(command(images, "MODEL.DROP_PATH 0.2", flags="--use-checkpoint"))
    assert plain.records("train") == again.records("train")
    assert same(plain.weights(), again.weights())


def test_accumulation_makes_fewer_updates_of_a_larger_batch(images, train):
    run = train(command(images, flags="--accumulation-steps 2", batch=4))
    finished(run)
    # 24 images in 6 batches of 4, two to an update; the rate belongs to the 8 images of an update.
    assert [record["update"] for record in run.records("train")] == [1, 2, 3]
    assert run.records("train")[0]["lr"] == pytest.approx(0.002 * 8 / 256, rel=1e-12)


def test_the_moving_average_is_evaluated_and_saved(images, train, script):
    run = train(command(images, "TRAIN.EMA_ALPHA 0.01 TRAIN.EMA_UPDATE_PERIOD 1"))
    finished(run)
    assert [record["images"] for record in run.records("eval_ema")] == [10]
    assert not same(run.weights(key="ema"), run.weights())
    assert run.weights(key="ema").keys() == run.weights().keys()
    top1 = f"Acc@1 {run.records('eval_ema')[0]['top1']:.3f}"
    result = script("test.py", images, "train", run.folder / "latest.pth", "--ema", "-j", 0)
    assert result.status == 0, result.err
    assert top1 in result.out
    assert (run.folder / "best_ema.pth").exists()


def test_the_moving_average_goes_on_after_a_resume(images, train, tmp_path):
    options = "TRAIN.EMA_ALPHA 0.01 TRAIN.EMA_UPDATE_PERIOD 1 TRAIN.EPOCHS 3 SAVE_FREQ 1"
    words = command(images).replace("TRAIN.EPOCHS 1 ", "") + f" {options}"
    straight = train(words)
    (tmp_path / ARCH / "run").mkdir(parents=True)
    (tmp_path / ARCH / "run" / "latest.pth").write_bytes((straight.folder / "ckpt_epoch_1.pth").read_bytes())
    resumed = train(words, output=tmp_path)
    assert len(resumed.records("eval_ema")) == 1
    assert same(resumed.weights(), straight.weights())
    assert same(resumed.weights(key="ema"), straight.weights(key="ema"))


def test_mixed_precision_differs_from_full_precision_by_rounding(images, train):
    full, mixed = (train(command(images, flags=f"--amp {amp}")) for amp in ("off", "bf16"))
    losses = [[record["loss"] for record in run.records("train")] for run in (full, mixed)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert {value.dtype for value in mixed.weights().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("cache", ["no", "part", "full"])
def test_zip_mode_trains_like_the_folder(images, zipped, train, cache):
    folder, archive = train(command(images)), train(command(zipped, flags=f"--zip --cache-mode {cache}"))
    assert folder.records("train") == archive.records("train")
    assert folder.records("eval") == archive.records("eval")
    assert same(folder.weights(), archive.weights())


def test_workers_change_nothing(images, train):
    alone = train(command(images, "AUG.PRESET raug15"))
    helped = train(command(images, "AUG.PRESET raug15").replace("DATA.NUM_WORKERS 0", "DATA.NUM_WORKERS 2"))
    assert same(alone.weights(), helped.weights())


def test_an_architecture_of_timm_trains(images, train, script, tmp_path):
    run = train(
        command(images, "DATA.IMG_SIZE 32", arch="resnet10t").replace("DATA.IMG_SIZE 16 ", ""), arch="resnet10t"
    )
    finished(run)
    payload = torch.load(run.folder / "latest.pth", weights_only=True)
    assert payload["meta"]["arch"] == "resnet10t"
    assert payload["model"]["fc.weight"].shape == (2, 512)
    options = f"--eval --resume {run.folder}/latest.pth --arch resnet10t --data-path {images} --output {tmp_path}"
    result = script("main_repmlp.py", *options.split(), "--opts", "DATA.IMG_SIZE", 32, "DATA.NUM_WORKERS", 0)
    assert result.status == 0, result.err
    last = run.records("eval")[-1]
    assert f"Acc@1 {last['top1']:.3f}" in result.out
    plain = script("test.py", images, "train", run.folder / "latest.pth", "-r", 32, "-j", 0)
    assert f"Acc@1 {last['top1']:.3f}" in plain.out


def test_more_classes_than_the_data_set_has(images, train):
    run = train(command(images, "MODEL.NUM_CLASSES 12"))
    assert run.weights()["head.weight"].shape == (12, 64)


def test_an_image_that_is_no_square(images, train):
    run = train(command(images, "DATA.IMG_SIZE 16,32").replace("DATA.IMG_SIZE 16 ", ""))
    finished(run)
    meta = torch.load(run.folder / "latest.pth", weights_only=True)["meta"]
    assert meta["image_size"] == [16, 32]


def test_a_few_unreadable_training_images_are_replaced_and_named(flawed, train):
    run = train(command(flawed.text_train))
    finished(run)
    (line,) = [line for line in run.result.out.splitlines() if "unreadable image replaced" in line]
    assert str(flawed.text_train / "train" / "bee" / "3.png") in line


@pytest.mark.parametrize(("keep", "left"), [(0, set()), (2, {1, 2})])
def test_how_many_numbered_checkpoints_stay(images, train, keep, left):
    options = f"TRAIN.EPOCHS 3 SAVE_FREQ 1 KEEP_CHECKPOINTS {keep}"
    run = train(command(images, options).replace("TRAIN.EPOCHS 1 ", ""))
    numbers = {
        int(number) for path in run.folder.iterdir() for number in re.findall(r"ckpt_epoch_(\d+)\.pth", path.name)
    }
    assert numbers == left
    assert (run.folder / "latest.pth").exists()


def test_how_often_is_evaluated(images, train):
    run = train(command(images, "TRAIN.EPOCHS 5 EVAL_FREQ 2").replace("TRAIN.EPOCHS 1 ", ""))
    assert [record["epoch"] for record in run.records("eval")] == [1, 3, 4]


def test_the_start_epoch(images, train):
    run = train(command(images, "TRAIN.EPOCHS 3 TRAIN.START_EPOCH 2").replace("TRAIN.EPOCHS 1 ", ""))
    assert [record["update"] for record in run.records("train")] == [7, 8, 9]
    assert [record["epoch"] for record in run.records("eval")] == [2]
