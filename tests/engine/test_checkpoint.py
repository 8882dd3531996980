"""The folder of a run: file names, retention, contents; resuming from our checkpoints and published ones."""

import errno
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_parts import checkpoint_folder, ema_of, optimizer_of, resume, schedule_of
from yacs.config import CfgNode

import models
from data import Batch, Normalize
from engine.checkpoint import CheckpointFolder, find_checkpoint, newest, numbered
from engine.optimizer import OPTIMIZERS, parameter_groups
from engine.state import ALWAYS, SOMETIMES, read_state
from engine.trainer import Progress, Trainer
from models.checkpoints import describe, read_checkpoint
from models.reparam import to_deploy
from utils.distributed import RankInfo

ARCH = "RepMLPNet-Digits"
LOGGER = logging.getLogger("tests.engine")
META = {"arch": ARCH, "num_classes": 10, "image_size": [16, 16], "form": "train"}


@pytest.fixture
def run_of(trainer_of):
    """Returns a function that builds a trainer of RepMLPNet-Digits whose weights come from a seed."""

    def make(seed: int, *, ema: bool = False, name: str = "adamw", **changes: object) -> Trainer:
        torch.manual_seed(seed)
        model = models.create_model(ARCH, 10)
        optimizer = optimizer_of(model, name=name, lr=0.002, weight_decay=0.05)
        schedule = schedule_of(optimizer, name="cosine", total_updates=100, warmup_updates=2)
        average = ema_of(model, alpha=0.1, period=2, global_batch=8, epochs=4, warmup_updates=2) if ema else None
        normalize = Normalize((0.3,) * 3, (0.4,) * 3)
        settings = {"optimizer": optimizer, "schedule": schedule, "ema": average, "normalize": normalize, "epochs": 4}
        return trainer_of(model, **settings | changes)

    return make


def epoch(number: int) -> list[Batch]:
    """Five batches of eight images of 16 x 16 pixels."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (5, 8, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (5, 8), generator=generator)
    return [Batch(images[i], labels[i], torch.arange(8), []) for i in range(5)]


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Every tensor and every plain value below containers, by its path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for k, v in items for name, leaf in flat(v, f"{prefix}/{k}").items()}
    return {prefix: value}


def assert_equal(first: object, second: object) -> None:
    """Bit for bit, in all containers."""
    left, right = flat(first), flat(second)
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        assert same, name


def state(trainer: Trainer) -> dict[str, object]:
    """The state of a run in memory."""
    return {
        "model": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "ema": {} if trainer.ema is None else trainer.ema.module.state_dict(),
        "progress": vars(trainer.progress),
    }


def folder(path: Path, keep: int = 3) -> CheckpointFolder:
    return checkpoint_folder(path, keep=keep, meta=META)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert newest(tmp_path, LOGGER) is None
    assert newest(tmp_path / "absent", LOGGER) is None
    assert numbered(tmp_path) == []


def test_names_of_checkpoints(tmp_path, run_of):
    trainer, checkpoints = run_of(1, ema=True), folder(tmp_path)
    trainer.progress.epoch = 1
    checkpoints.save(trainer)
    assert names(tmp_path) == {"latest.pth"}
    trainer.progress.epoch = 2
    checkpoints.save(trainer, periodic=True)
    assert names(tmp_path) == {"latest.pth", "ckpt_epoch_1.pth"}
    checkpoints.save(trainer, best=True, best_ema=True)
    assert names(tmp_path) == {"latest.pth", "ckpt_epoch_1.pth", "best_ckpt.pth", "best_ema.pth"}
    assert newest(tmp_path, LOGGER).path == tmp_path / "latest.pth"


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_the_newest_numbered_checkpoints_are_kept(tmp_path, run_of, keep):
    trainer, checkpoints = run_of(1), folder(tmp_path, keep)
    for finished in (2, 9, 10, 11):
        trainer.progress.epoch = finished + 1
        checkpoints.save(trainer, periodic=True, best=finished == 2)
    expected = [f"ckpt_epoch_{finished}.pth" for finished in (2, 9, 10, 11)[4 - keep :]]
    assert [path.name for path in numbered(tmp_path)] == expected
    assert names(tmp_path) == {"latest.pth", "best_ckpt.pth", *expected}
    assert read_checkpoint(tmp_path / "latest.pth").payload["epoch"] == 11
    assert read_checkpoint(tmp_path / "best_ckpt.pth").payload["epoch"] == 2


def test_without_a_latest_one_the_highest_number_is_the_newest(tmp_path, run_of):
    trainer, checkpoints = run_of(1), folder(tmp_path)
    for finished in (9, 10):
        trainer.progress.epoch = finished + 1
        checkpoints.save(trainer, periodic=True)
    (tmp_path / "latest.pth").unlink()
    (tmp_path / "ckpt_epoch_best.pth").touch()
    assert newest(tmp_path, LOGGER).path == tmp_path / "ckpt_epoch_10.pth"


def test_a_checkpoint_is_plain_data_with_its_description(tmp_path, run_of):
    trainer = run_of(1, ema=True)
    trainer.train_epoch(epoch(0))
    folder(tmp_path).save(trainer)
    payload = torch.load(tmp_path / "latest.pth", weights_only=True)
    assert (payload["meta"], payload["metric"]) == (META, "top1")
    assert "TAG: test\n" in payload["config"]
    assert (payload["epoch"], payload["max_accuracy"]) == (0, 0.0)
    assert_equal(payload["model"], trainer.network.state_dict())
    assert_equal(payload["ema"], trainer.ema.module.state_dict())
    plain = (Tensor, int, float, str, bool, type(None))
    assert all(isinstance(leaf, plain) for leaf in flat(payload).values())


def test_no_temporary_file_is_left(tmp_path, run_of):
    checkpoints = folder(tmp_path)
    checkpoints.save(run_of(1), periodic=True, best=True)
    assert not [name for name in names(tmp_path) if name.startswith(".") or name.endswith(".tmp")]


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_run_bit_for_bit(tmp_path, run_of, ema, name):
    straight = run_of(1, ema=ema, name=name)
    straight.train_epoch(epoch(0))
    straight.progress.best_metric = 12.5
    folder(tmp_path).save(straight)
    resumed = run_of(2, ema=ema, name=name)
    resume(resumed, tmp_path / "latest.pth")
    for part in ("model", "ema", "progress"):
        assert_equal(state(resumed)[part], state(straight)[part])
    assert_equal(resumed.optimizer.state_dict()["state"], straight.optimizer.state_dict()["state"])
    assert (resumed.progress.epoch, resumed.progress.update, resumed.progress.best_metric) == (1, 5, 12.5)
    for trainer in (straight, resumed):
        trainer.train_epoch(epoch(1))
    assert_equal(state(resumed), state(straight))


def test_hyper_parameters_come_from_the_configuration(tmp_path, run_of):
    trainer = run_of(1)
    trainer.train_epoch(epoch(0))
    folder(tmp_path).save(trainer)
    other = run_of(1)
    for group in other.optimizer.param_groups:
        group.update(weight_decay=0.3, betas=(0.5, 0.6))
    resume(other, tmp_path / "latest.pth")
    assert [(g["weight_decay"], g["betas"]) for g in other.optimizer.param_groups] == [(0.3, (0.5, 0.6))] * 2
    own, loaded = (list(t.optimizer.state.values()) for t in (trainer, other))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(own, loaded, strict=True))


def test_a_moving_average_added_later_starts_from_the_weights(tmp_path, run_of):
    trainer = run_of(1)
    trainer.train_epoch(epoch(0))
    folder(tmp_path).save(trainer)
    averaging = run_of(2, ema=True)
    resume(averaging, tmp_path / "latest.pth")
    assert_equal(averaging.ema.module.state_dict(), trainer.network.state_dict())


def published_checkpoint(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Writes the checkpoint of the published code after its epoch 6; returns the network and the optimizer."""
    torch.manual_seed(5)
    model = models.create_model(ARCH, 10)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    config = CfgNode({"MODEL": CfgNode({"ARCH": ARCH}), "TRAIN": CfgNode({"EPOCHS": 100, "OPTIMIZER": "adamw"})})
    config.freeze()
    payload = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"t_initial": 500400, "base_values": [1e-3, 1e-3], "metric": None},
        "max_accuracy": 71.25,
        "epoch": 6,
        "config": config,
    }
    torch.save(payload, path)
    return model, payload["optimizer"]


def test_a_published_checkpoint_resumes_after_its_epoch(tmp_path, run_of):
    published, optimizer = published_checkpoint(tmp_path / "published.pth")
    trainer = run_of(1, ema=True)
    resume(trainer, tmp_path / "published.pth")
    assert_equal(trainer.network.state_dict(), published.state_dict())
    assert_equal(trainer.ema.module.state_dict(), published.state_dict())
    assert_equal(trainer.optimizer.state_dict()["state"], optimizer["state"])
    progress = trainer.progress
    assert (progress.epoch, progress.consumed, progress.update, progress.best_metric) == (7, 0, 35, 71.25)
    before = trainer.network.head.weight.clone()
    trainer.train_epoch(epoch(0))
    assert (trainer.progress.epoch, trainer.progress.update) == (8, 40)
    assert not torch.equal(before, trainer.network.head.weight)


def test_names_with_the_prefix_of_a_wrapper(tmp_path, run_of):
    trainer = run_of(1)
    folder(tmp_path).save(trainer)
    payload = torch.load(tmp_path / "latest.pth", weights_only=True)
    payload["model"] = {f"module.{name}": value for name, value in payload["model"].items()}
    torch.save(payload, tmp_path / "wrapped.pth")
    other = run_of(2)
    resume(other, tmp_path / "wrapped.pth")
    assert_equal(other.network.state_dict(), trainer.network.state_dict())


def saved(path: Path, trainer: Trainer, **changes: object) -> Path:
    """Writes a checkpoint with some entries replaced, or left out where they are None."""
    folder(path.parent).save(trainer)
    payload = torch.load(path.parent / "latest.pth", weights_only=True) | changes
    torch.save({key: value for key, value in payload.items() if value is not None}, path)
    return path


def test_weights_alone_are_for_pretrained(tmp_path, run_of):
    path = saved(tmp_path / "weights.pth", run_of(1), optimizer=None, progress=None, epoch=None)
    with pytest.raises(
        ValueError, match=re.escape("start from it with MODEL.PRETRAINED instead of MODEL.RESUME")
    ) as error:
        resume(run_of(2), path)
    assert str(error.value).startswith(f"{path} holds weights but not the state of a training")


def test_a_bare_state_dict_is_for_pretrained(tmp_path, run_of):
    torch.save(run_of(1).network.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"optimizer and epoch is missing\): start from it with MODEL.PRETRAINED"):
        resume(run_of(2), tmp_path / "bare.pth")


def test_deploy_weights_do_not_resume(tmp_path, run_of):
    trainer = run_of(1)
    path = saved(tmp_path / "deploy.pth", trainer, model=to_deploy(trainer.network).state_dict())
    with pytest.raises(ValueError, match=r"does not fit the network: .*These are deploy weights of RepMLPNet-Digits"):
        resume(run_of(2), path)


def test_another_number_of_classes_does_not_resume(tmp_path, run_of):
    torch.manual_seed(0)
    other = models.create_model(ARCH, 7)
    path = saved(
        tmp_path / "seven.pth", run_of(1), model=other.state_dict(), meta=describe(ARCH, other, (16, 16), "train")
    )
    with pytest.raises(ValueError, match="train weights of RepMLPNet-Digits with 7 classes"):
        resume(run_of(2), path)


@pytest.mark.parametrize(("written", "wanted"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_the_state_of_another_optimizer_is_refused(tmp_path, run_of, written, wanted):
    trainer = run_of(1, name=written)
    trainer.train_epoch(epoch(0))
    folder(tmp_path).save(trainer)
    with pytest.raises(ValueError, match="optimizer"):
        resume(run_of(2, name=wanted), tmp_path / "latest.pth")


def test_an_optimizer_of_other_groups_is_refused(tmp_path, run_of):
    trainer = run_of(1)
    trainer.train_epoch(epoch(0))
    one_group = trainer.optimizer.state_dict() | {"param_groups": trainer.optimizer.state_dict()["param_groups"][:1]}
    path = saved(tmp_path / "group.pth", trainer, optimizer=one_group)
    with pytest.raises(ValueError, match=re.escape(f"the optimizer's state in {path} does not fit")):
        resume(run_of(2), path)


# Invalid payloads


@pytest.fixture
def whole(tmp_path, run_of) -> tuple[Path, dict[str, Any]]:
    """A file of a run with an average after five updates, and what is in it."""
    trainer = run_of(1, ema=True)
    trainer.train_epoch(epoch(0))
    folder(tmp_path).save(trainer, periodic=True, best=True)
    return tmp_path / "latest.pth", torch.load(tmp_path / "latest.pth", weights_only=True)


def change(payload: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    """Returns a payload in which one entry, named by its path, has another value."""
    *parents, name = place.split("/")
    target = payload
    for parent in parents:
        target = target[int(parent) if isinstance(target, list) or parent.isdecimal() else parent]
    target[int(name) if isinstance(target, list) or name.isdecimal() else name] = value
    return payload


HUGE = torch.zeros(1).expand(10**12)
MUTATIONS: list[tuple[str, object]] = [
    ("epoch", "x/../../../victim/best"),
    ("epoch", 3),
    ("epoch", -2),
    ("epoch", 1.0),
    ("epoch", torch.tensor(0)),
    ("epoch", True),
    ("max_accuracy", "high"),
    ("max_accuracy", math.nan),
    ("progress", []),
    ("progress", {}),
    ("progress", {"epoch": 1}),
    ("progress/epoch", "1"),
    ("progress/epoch", -1),
    ("progress/epoch", 10**30),
    ("progress/consumed", None),
    ("progress/update", 5.5),
    ("progress/update", "5"),
    ("progress/best_metric", math.inf),
    ("progress/skipped", [1]),
    ("progress/best_metric", 10**400),
    ("max_accuracy", -(10**400)),
    ("run/images", 0),
    ("run/global_batch", 0),
    ("run", {"seed": 0}),
    ("optimizer/state/0/exp_avg_sq", torch.full((32, 12), -1.0)),
    ("optimizer/state/0/step", torch.tensor(-5.0)),
    ("saved_as", 3),
    ("saved_as", {"numbered": True}),
    ("saved_as/best", "yes"),
    ("run", None),
    ("run/seed", "0"),
    ("run/images", [40]),
    ("meters", []),
    ("meters/loss", [1.0]),
    ("meters/loss", ["1", 2]),
    ("meters/loss", [math.nan, 1.0]),
    ("unreadable", "a.png"),
    ("unreadable", [3]),
    ("rank_statistics", torch.zeros(3)),
    ("rank_statistics", [[0.0]]),
    ("rank_statistics", [torch.zeros(3)]),
    ("rank_statistics", [HUGE]),
    ("rank_statistics", [torch.zeros(3), torch.zeros(3)]),
    ("optimizer", []),
    ("optimizer", {}),
    ("optimizer", {"state": {}, "param_groups": []}),
    ("optimizer/state", []),
    ("optimizer/state/0", None),
    ("optimizer/state/0", {}),
    ("optimizer/state/0/exp_avg", "x"),
    ("optimizer/state/0/exp_avg", torch.zeros(3)),
    ("optimizer/state/0/exp_avg", HUGE),
    ("optimizer/state/0/exp_avg_sq", torch.zeros(2, 2).to_sparse()),
    ("optimizer/state/0/exp_avg", torch.tensor(math.nan)),
    ("optimizer/state/0/step", torch.zeros(4)),
    ("optimizer/state/0/step", math.nan),
    ("optimizer/state/0/colour", torch.zeros(1)),
    ("optimizer/state/99999", {"step": 1.0}),
    ("optimizer/param_groups", {}),
    ("optimizer/param_groups/0", {"lr": 1}),
    ("optimizer/param_groups/0/params", "all"),
    ("optimizer/param_groups/0/params/0", "0"),
    ("optimizer/param_groups/0/params/0", 1),
    ("scaler", []),
    ("scaler", {"scale": 65536.0}),
    ("model", []),
    ("model", "weights"),
    ("model/head.bias", HUGE),
    ("model/head.bias", torch.zeros(10).to("meta")),
    ("model/head.bias", torch.full((10,), math.nan)),
    ("model/head.bias", torch.zeros(10, dtype=torch.int64)),
    ("ema", [1]),
    ("ema/head.bias", "x"),
    ("ema/head.bias", torch.full((10,), math.inf)),
    ("criterion", []),
    ("criterion", {"weight": torch.zeros(3)}),
    ("meta", []),
    ("meta", "digits"),
    ("meta/arch", 3),
    ("meta/image_size", "16x16"),
    ("meta/num_classes", [10]),
    ("meta/weights", "best"),
    ("config", 7),
    ("config", {"TAG": "test"}),
]


@pytest.mark.parametrize(("place", "value"), MUTATIONS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(MUTATIONS)])
def test_an_invalid_payload_is_refused(tmp_path, run_of, whole, place, value):
    """It is refused in one line before any of it is used, and skipped in favour of an older checkpoint."""
    path, payload = whole
    path.unlink()  # a link would change the other files too
    torch.save(change(payload, place, value), path)
    before = {entry: entry.read_bytes() for entry in tmp_path.rglob("*.pth")}
    fresh = run_of(2, ema=True)
    weights = {name: value.clone() for name, value in fresh.network.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        resume(fresh, path)
    assert len(str(error.value).splitlines()) == 1
    checked_later = re.match("(model|ema|criterion|optimizer|rank_statistics)/?", place)
    assert checked_later or all(torch.equal(v, weights[k]) for k, v in fresh.network.state_dict().items())
    if not checked_later:
        assert find_checkpoint(tmp_path, LOGGER).path.name in ("best_ckpt.pth", "ckpt_epoch_0.pth")
        assert {entry: entry.read_bytes() for entry in tmp_path.rglob("*.pth") if entry != path} == {
            entry: content for entry, content in before.items() if entry != path
        }


def test_a_file_name_contains_only_a_number_from_the_checkpoint(tmp_path, run_of):
    """A checkpoint in a run's folder can't make the run write elsewhere."""
    victim = tmp_path / "victim" / "best.pth"
    victim.parent.mkdir()
    victim.write_bytes(b"somebody's weights")
    run = tmp_path / "output" / "arch" / "tag"
    folder(run).save(run_of(1), periodic=True)
    payload = torch.load(run / "latest.pth", weights_only=True) | {"epoch": "x/../../../../victim/best"}
    (run / "ckpt_epoch_x").mkdir()
    for path in run.glob("*.pth"):
        path.unlink()
    torch.save(payload, run / "latest.pth")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        find_checkpoint(run, LOGGER)
    assert victim.read_bytes() == b"somebody's weights"


def test_the_schema_holds_for_every_state_that_is_saved(tmp_path, run_of):
    trainer = run_of(1, ema=True)
    trainer.criterion = torch.nn.Linear(2, 3)
    folder(tmp_path).save(trainer, best=True, best_ema=True)
    payload = torch.load(tmp_path / "latest.pth", weights_only=True)
    assert payload.keys() == ALWAYS.keys() | SOMETIMES.keys()
    assert vars(Progress()).keys() == payload["progress"].keys()
    for name in ("latest.pth", "best_ckpt.pth", "best_ema.pth"):
        assert read_state(tmp_path / name).payload.keys() == payload.keys()


# One state, several names


def test_a_state_is_written_once(tmp_path, run_of):
    trainer, checkpoints = run_of(1, ema=True), folder(tmp_path)
    trainer.progress.epoch = 1
    checkpoints.save(trainer, periodic=True, best=True, best_ema=True)
    inodes = {path.name: path.stat().st_ino for path in tmp_path.glob("*.pth")}
    assert inodes["latest.pth"] == inodes["best_ckpt.pth"] == inodes["ckpt_epoch_0.pth"] != inodes["best_ema.pth"]
    best = (tmp_path / "best_ckpt.pth").read_bytes()
    trainer.train_epoch(epoch(1))
    checkpoints.save(trainer)
    assert (tmp_path / "best_ckpt.pth").read_bytes() == best != (tmp_path / "latest.pth").read_bytes()
    assert (tmp_path / "best_ckpt.pth").stat().st_nlink == 2


def test_a_file_system_without_hard_links(tmp_path, run_of, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    trainer, checkpoints = run_of(1), folder(tmp_path)
    checkpoints.save(trainer, best=True)
    assert (tmp_path / "best_ckpt.pth").read_bytes() == (tmp_path / "latest.pth").read_bytes()
    assert names(tmp_path) == {"latest.pth", "best_ckpt.pth"}


@pytest.mark.parametrize("left", ["latest.pth", "best_ckpt.pth", "best_ema.pth"])
def test_missing_files_are_restored_from_any_file_of_a_killed_run(tmp_path, run_of, left):
    trainer, checkpoints = run_of(1, ema=True), folder(tmp_path)
    checkpoints.save(trainer, best=True, best_ema=True)
    before = {path.name: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pth")}
    assert {name: "ema" if state["meta"].get("weights") == "ema" else None for name, state in before.items()} == {
        "latest.pth": None,
        "best_ckpt.pth": None,
        "best_ema.pth": "ema",
    }
    for path in tmp_path.glob("*.pth"):
        if path.name != left:
            path.unlink()
    found = find_checkpoint(tmp_path, LOGGER)
    assert found.path.name == left
    checkpoints.complete(found)
    after = {path.name: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pth")}
    for name in before:
        assert_equal(before[name], after[name])


def test_best_ema_evaluates_the_average_and_resumes_like_any_other(tmp_path, run_of):
    straight = run_of(1, ema=True)
    straight.train_epoch(epoch(0))
    folder(tmp_path).save(straight, best=True, best_ema=True)
    assert_equal(read_checkpoint(tmp_path / "best_ema.pth").state_dict, straight.ema.module.state_dict())
    assert_equal(read_checkpoint(tmp_path / "best_ckpt.pth").state_dict, straight.network.state_dict())
    resumed = run_of(2, ema=True)
    resume(resumed, tmp_path / "best_ema.pth")
    for part in ("model", "ema", "progress"):
        assert_equal(state(resumed)[part], state(straight)[part])


# Another experiment


@pytest.mark.parametrize(
    "other",
    [
        {"arch": "RepMLPNet-C100"},
        {"num_classes": 7},
        {"image_size": [16, 32]},
        {"dataset": "shapes"},
        {"structure": {"branches": [3]}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_experiment_does_not_resume(tmp_path, run_of, other):
    meta = META | {"dataset": "digits", "structure": {}}
    checkpoint_folder(tmp_path, keep=1, meta=meta).save(run_of(1))
    found = find_checkpoint(tmp_path, LOGGER)
    ((key, value),) = other.items()
    with pytest.raises(ValueError, match=re.escape(f"another experiment, with {key} {meta[key]} instead of {value}")):
        checkpoint_folder(tmp_path, keep=1, meta=meta | other).check_experiment(found)
    for same in ({"versions": {"torch": "0"}}, {"form": None}):
        checkpoint_folder(tmp_path, keep=1, meta=meta | same).check_experiment(found)
    with pytest.raises(ValueError, match="another experiment, with form train instead of deploy"):
        checkpoint_folder(tmp_path, keep=1, meta=meta | {"form": "deploy"}).check_experiment(found)


def test_an_absent_file(tmp_path, run_of):
    with pytest.raises(ValueError, match=r"no checkpoint at .*absent\.pth: no such file"):
        resume(run_of(1), tmp_path / "absent.pth")


def test_a_run_that_was_killed_while_it_saved_gets_its_best_checkpoint(tmp_path, run_of):
    folder = checkpoint_folder(tmp_path, keep=1)
    folder.save(run_of(1), best=True)
    (tmp_path / "best_ckpt.pth").unlink()
    (tmp_path / ".latest.pth.abc.tmp").touch()
    found = find_checkpoint(tmp_path, logging.getLogger())
    assert found.path == tmp_path / "latest.pth"
    folder.complete(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_ckpt.pth", "latest.pth"]


def test_parameters_of_another_loss_are_refused(tmp_path, run_of):
    run = run_of(1)
    run.criterion = torch.nn.Linear(2, 3)
    checkpoint_folder(tmp_path, keep=1).save(run)
    for other in (torch.nn.Linear(2, 4), torch.nn.CrossEntropyLoss()):
        again = run_of(1)
        again.criterion = other
        with pytest.raises(ValueError, match="another loss or other classes: give this run another TAG"):
            resume(again, tmp_path / "latest.pth")


def running_statistics(trainer: Trainer) -> set[float]:
    """Every value of the running means and variances of the trained network, each once."""
    norms = [module for module in trainer.network.modules() if isinstance(module, nn.BatchNorm2d)]
    return {value for norm in norms for value in (*norm.running_mean.tolist(), *norm.running_var.tolist())}


@pytest.mark.parametrize(("rank", "world_size", "expected"), [(0, 2, 1.0), (1, 2, 5.0), (0, 1, 3.0), (2, 3, 3.0)])
def test_each_process_gets_its_own_running_statistics_back_or_the_mean_of_all(
    tmp_path, run_of, rank, world_size, expected
):
    trainer = run_of(1)
    trainer.train_epoch(epoch(0))
    (of_one,) = torch.load(saved(tmp_path / "one.pth", trainer), weights_only=True)["rank_statistics"]
    path = saved(tmp_path / "two.pth", trainer, rank_statistics=[torch.full_like(of_one, v) for v in (1.0, 5.0)])
    resumed = run_of(2, rank_info=RankInfo(rank, world_size, rank, torch.device("cpu")))
    resume(resumed, path)
    assert running_statistics(resumed) == {expected}


def test_running_statistics_are_ignored_when_a_moving_average_begins(tmp_path, run_of):
    trainer = run_of(1)
    trainer.train_epoch(epoch(0))
    (of_one,) = torch.load(saved(tmp_path / "one.pth", trainer), weights_only=True)["rank_statistics"]
    path = saved(tmp_path / "two.pth", trainer, rank_statistics=[torch.full_like(of_one, v) for v in (1.0, 5.0)])
    averaging = run_of(2, ema=True)
    resume(averaging, path)
    assert_equal(averaging.network.state_dict(), trainer.network.state_dict())
    assert_equal(averaging.ema.module.state_dict(), trainer.network.state_dict())


def test_a_run_killed_between_two_files_of_a_state_gets_the_newer_one(tmp_path, run_of):
    trainer, checkpoints = run_of(1), folder(tmp_path, keep=1)
    for number in range(2):
        trainer.train_epoch(epoch(number))
        checkpoints.save(trainer, periodic=True, best=True)
        if number == 0:
            older = (tmp_path / "best_ckpt.pth").read_bytes(), (tmp_path / "ckpt_epoch_0.pth").read_bytes()
    (tmp_path / "best_ckpt.pth").unlink()  # a name of the newer state as well
    (tmp_path / "best_ckpt.pth").write_bytes(older[0])
    (tmp_path / "ckpt_epoch_1.pth").unlink()
    (tmp_path / "ckpt_epoch_0.pth").write_bytes(older[1])
    found = find_checkpoint(tmp_path, LOGGER)
    assert found.path == tmp_path / "latest.pth"
    checkpoints.complete(found)
    assert names(tmp_path) == {"latest.pth", "best_ckpt.pth", "ckpt_epoch_1.pth"}
    updates = [read_checkpoint(path).payload["progress"]["update"] for path in sorted(tmp_path.iterdir())]
    assert updates == [10, 10, 10]
