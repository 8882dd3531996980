"""Checkpoints of every origin: read as data alone, built, loaded strictly, and written atomically."""

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_helpers import random_tensor, randomised
from timm.layers import to_2tuple
from torch import Tensor, nn
from yacs.config import CfgNode

from models import RepMLPNet, create_model, default_image_size
from models.build import REGISTRY, classifier_name, first_conv_name
from models.checkpoints import (
    META,
    Checkpoint,
    adapt_input,
    build_from,
    describe,
    load_pretrained,
    load_weights,
    output_names,
    read_checkpoint,
    storable_names,
)
from models.files import write_checkpoint
from models.identify import fitting_architectures
from models.reparam import to_deploy

ARCH = "RepMLPNet-Digits"
CLASSES = 6


@pytest.fixture(scope="module")
def model() -> RepMLPNet:
    """A network whose weights and statistics are all random; in single precision, as files mostly are."""
    return randomised(create_model(ARCH, CLASSES)).float().eval()


@pytest.fixture(scope="module")
def weights(model: RepMLPNet) -> dict[str, Tensor]:
    return model.state_dict()


def saved(path: Path, payload: object) -> Path:
    torch.save(payload, path)
    return path


def same(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> bool:
    return list(expected) == list(actual) and all(
        value.dtype == actual[name].dtype and torch.equal(value, actual[name]) for name, value in expected.items()
    )


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


# Reading


CONTAINERS: dict[str, Callable] = {
    "bare": lambda w: w,
    "bare ordered": OrderedDict,
    "model": lambda w: {"model": w, "epoch": 3},
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "DDP": lambda w: {"model": prefixed(w, "module.")},
    "compiled": lambda w: {"state_dict": prefixed(w, "_orig_mod.")},
    "compiled DDP": lambda w: prefixed(w, "_orig_mod.module."),
    "DDP compiled": lambda w: prefixed(w, "module._orig_mod."),
    "nested": lambda w: {"model": {"state_dict": w, "args": {"lr": 0.1}}},
    "average alone": lambda w: {"ema": w},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_is_read(kind: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", CONTAINERS[kind](weights))
    checkpoint = read_checkpoint(path)
    assert same(weights, checkpoint.state_dict)
    assert (checkpoint.path, checkpoint.form, checkpoint.meta) == (path, "train", {})


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema"])
def test_the_moving_average_is_read_when_asked_for(key: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in weights.items()}
    path = saved(tmp_path / "a.pth", {"model": weights, key: prefixed(average, "module.")})
    assert same(weights, read_checkpoint(path).state_dict)
    assert same(average, read_checkpoint(path, ema=True).state_dict)


def test_a_checkpoint_without_average_says_so(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"model": weights})
    with pytest.raises(ValueError, match="holds no moving average of the weights") as error:
        read_checkpoint(path, ema=True)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_what_is_written_is_read(name: str, form: str, model: RepMLPNet, tmp_path: Path) -> None:
    network = model if form == "train" else to_deploy(model)
    meta = describe(ARCH, network, (16, 16), form)
    write_checkpoint(tmp_path / name, {"model": network.state_dict(), "meta": meta})
    checkpoint = read_checkpoint(tmp_path / name)
    assert sorted(checkpoint.state_dict) == sorted(network.state_dict())
    assert all(torch.equal(value, checkpoint.state_dict[key]) for key, value in network.state_dict().items())
    assert checkpoint.form == form
    assert checkpoint.meta == meta
    built = build_from(checkpoint)
    assert (built.arch, built.num_classes, built.image_size) == (ARCH, CLASSES, (16, 16))
    images = random_tensor(2, 3, 16, 16).float()
    assert torch.equal(network(images), built.model(images))


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_a_changed_structure_is_built_again(form: str, tmp_path: Path) -> None:
    network = create_model(ARCH, CLASSES, branches=[5], share_sets=[2, 8], global_perceptron=False).eval()
    network = network if form == "train" else to_deploy(network)
    meta = describe(ARCH, network, (16, 16), form)
    write_checkpoint(tmp_path / "a.pth", {"model": network.state_dict(), "meta": meta})
    images = random_tensor(2, 3, 16, 16).float()
    assert torch.equal(network(images), build_from(read_checkpoint(tmp_path / "a.pth")).model(images))


def test_metadata_says_what_the_weights_are(model: RepMLPNet) -> None:
    meta = describe(ARCH, model, (16, 32), "deploy")
    versions = meta.pop("versions")
    assert meta == {"arch": ARCH, "num_classes": CLASSES, "image_size": [16, 32], "form": "deploy", "structure": {}}
    assert sorted(versions) == ["repmlpnet", "timm", "torch"]
    assert versions["torch"] == str(torch.__version__)
    assert {type(version) for version in versions.values()} == {str}


def test_metadata_take_more(model: RepMLPNet) -> None:
    meta = describe(ARCH, model, (16, 16), "train", task="verification", dataset=None, metric="TAR")
    assert meta == describe(ARCH, model, (16, 16), "train") | {"task": "verification", "metric": "TAR"}


@pytest.mark.parametrize("task", ["classification", "verification"])
def test_a_task_that_a_classifier_does_is_built_as_any(task: str, model: RepMLPNet, tmp_path: Path) -> None:
    meta = describe(ARCH, model, (16, 16), "train", task=task)
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta}))
    assert same(model.state_dict(), build_from(checkpoint).model.state_dict())


def test_the_arguments_of_a_segmentation_network_are_none_of_a_classifier(model: RepMLPNet, tmp_path: Path) -> None:
    meta = describe(ARCH, model, (16, 16), "train") | {"network": {}}
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta}))
    with pytest.raises(ValueError, match=r"a\.pth is of a segmentation network, not of a classifier"):
        build_from(checkpoint)


@pytest.mark.parametrize("key", ["task", "dataset", "metric"])
def test_metadata_of_a_wrong_type_are_refused(key: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"model": weights, "meta": {key: 3}})
    with pytest.raises(ValueError, match=f"damaged or of another program: meta.{key} is 3, not text"):
        read_checkpoint(path)


def test_safetensors_of_another_origin_are_read(weights: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(weights, tmp_path / "a.safetensors")
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.meta == {}
    assert build_from(checkpoint).arch == ARCH


def published_config() -> CfgNode:
    """A frozen configuration with nested nodes and every type that the published training code keeps in one."""
    config = CfgNode({"DATA": {"IMG_SIZE": 16, "DATA_PATH": ""}, "MODEL": {"ARCH": "RepMLPNet-B224", "NUM": 1000}})
    config.TRAIN = CfgNode({"BASE_LR": 1e-3, "WARMUP": None, "EMA": False, "STEPS": [1, 2], "BETAS": (0.9, 0.999)})
    config.freeze()
    return config


def test_a_published_training_checkpoint_with_its_pickled_configuration(model: RepMLPNet, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    config = published_config()
    payload = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-3], "t_in_epochs": False, "metric": None},
        "max_accuracy": 77.5,
        "epoch": 99,
        "config": config,
        "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 12}},
    }
    checkpoint = read_checkpoint(saved(tmp_path / "latest.pth", payload))
    assert same(model.state_dict(), checkpoint.state_dict)
    assert (checkpoint.payload["epoch"], checkpoint.payload["max_accuracy"]) == (99, 77.5)
    read = checkpoint.payload["config"]
    assert not isinstance(read, CfgNode)
    assert read == config
    assert read["TRAIN"]["BETAS"] == (0.9, 0.999)
    assert build_from(checkpoint).arch == ARCH


# Files that are no checkpoints


class Payload:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


class Home(nn.Module):
    """A network that is pickled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize("place", ["alone", "beside weights", "in the configuration", "plain pickle", "old format"])
def test_code_in_a_file_is_not_run(place: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    evil = Payload(f"touch {marker}")
    if place == "plain pickle":
        path.write_bytes(pickle.dumps({"model": evil}, protocol=2))
    elif place == "in the configuration":
        config = published_config()
        dict.__setitem__(config, "HOOK", evil)
        torch.save({"model": weights, "config": config}, path)
    elif place == "old format":
        torch.save({"model": evil}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"alone": evil, "beside weights": {"model": weights, "extra": evil}}[place], path)

    with pytest.raises(ValueError, match="damaged or no checkpoint that can be read safely") as error:
        read_checkpoint(path)

    assert not marker.exists()
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert "it holds Python objects, and loading those could run code" in str(error.value)
    # The payload is a real one: a reader that trusts the file runs it.
    if place == "beside weights":
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_a_pickled_network_is_refused(tmp_path: Path) -> None:
    for network in (Home(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="it holds Python objects, and loading those could run code"):
            read_checkpoint(saved(tmp_path / "a.pth", network))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no checkpoint at {tmp_path / 'a.pth'}: no such file")):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=re.escape(f"no checkpoint at {tmp_path}: that is a folder")):
        read_checkpoint(tmp_path)


NO_CHECKPOINT = "its content is not that of a checkpoint"
DAMAGES = [
    ("truncated", ".pth", "its end is missing"),
    ("halved", ".pth", "its end is missing"),
    ("bit flipped", ".pth", r"the check sum of \S+/data/\d+ is wrong"),
    ("empty", ".pth", NO_CHECKPOINT),
    ("text", ".pth", NO_CHECKPOINT),
    ("image", ".pth", NO_CHECKPOINT),
    *((damage, ".safetensors", r"\w") for damage in ("truncated", "halved", "empty", "text", "image")),
]


@pytest.mark.parametrize(("damage", "suffix", "reason"), DAMAGES)
def test_a_damaged_file(damage: str, suffix: str, reason: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_checkpoint(path, {"model": weights})
    content = path.read_bytes()
    middle = len(content) // 2
    inside = content.find(weights["head.weight"].numpy().tobytes()) + 100
    damaged = {
        "truncated": content[:-10],
        "halved": content[:middle],
        "bit flipped": content[:inside] + bytes([content[inside] ^ 1]) + content[inside + 1 :],
        "empty": b"",
        "text": b"404: Not Found\n",
        "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }
    assert inside > 100
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"is damaged or no checkpoint that can be read safely: {reason}") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)  # no advice to trust the file


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([1, 2], "holds no weights but a list"),
        (torch.ones(3), "holds no weights but a Tensor"),
        ({}, "holds no weights: found nothing"),
        ({"model": {}}, "holds no weights: found nothing"),
        ({"optimizer": {"lr": 1}, "epoch": 3}, "holds no weights: found 'optimizer', 'epoch'"),
        ({"model": {"conv": 3}}, "holds no weights: found 'conv'"),
        (dict.fromkeys("abcdef", 1), "holds no weights: found 'a', 'b', 'c', 'd', 'e'"),
        ({0: torch.ones(3)}, "holds no weights: found 0"),
    ],
    ids=str,
)
def test_a_file_without_weights(payload: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a.pth {message}") + "$"):
        read_checkpoint(saved(tmp_path / "a.pth", payload))


# Building


OURS = [
    (ARCH, {}),
    (ARCH, {"in_chans": 1}),
    (ARCH, {"img_size": 32}),
    (ARCH, {"img_size": (16, 32)}),
    (ARCH, {"img_size": (8, 32)}),  # as many positions as the architecture's own size
    ("RepMLPNet-C100", {"in_chans": 2}),
    ("ResMLP-Shapes", {"in_chans": 1, "img_size": (16, 64), "branches": [5]}),
]
OF_TIMM = [("resnet18", {}), ("resnet18", {"img_size": (64, 64)}), ("mixer_s32_224", {"img_size": (64, 64)})]


@pytest.mark.parametrize(
    ("arch", "options", "form"),
    [(*case, form) for case in OURS for form in ("train", "deploy")] + [(*case, None) for case in OF_TIMM],
    ids=str,
)
def test_a_network_is_built_from_what_its_checkpoint_tells(
    arch: str, options: dict, form: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = create_model(arch, 9, deploy=form == "deploy", **options).eval()
    size = network.img_size if form else options.get("img_size", (224, 224))
    meta = describe(arch, network, size, form)
    write_checkpoint(tmp_path / "a.pth", {"model": network.state_dict(), "meta": meta})

    checkpoint = read_checkpoint(tmp_path / "a.pth")
    built = build_from(checkpoint)

    assert checkpoint.form == form
    assert (built.arch, built.num_classes, built.image_size) == (arch, 9, size)
    assert not built.model.training
    images = torch.randn(1, options.get("in_chans", 3), *size)
    with torch.no_grad():
        assert torch.equal(network(images), built.model(images))


@pytest.mark.parametrize("deploy", [False, True])
def test_a_bare_state_dict_tells_its_architecture(deploy: bool, tmp_path: Path) -> None:
    for arch in (ARCH, "RepMLPNet-C100", "ResMLP-Shapes"):
        network = create_model(arch, 9, deploy=deploy)
        built = build_from(read_checkpoint(saved(tmp_path / "a.pth", network.state_dict())))
        assert (built.arch, built.num_classes, built.image_size) == (arch, 9, network.img_size)
        assert same(network.state_dict(), built.model.state_dict())


@pytest.mark.parametrize("size", [8, 24, 32])
def test_a_bare_state_dict_of_another_square_size(size: int, tmp_path: Path) -> None:
    network = create_model(ARCH, 9, img_size=size, in_chans=1)
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", network.state_dict()))
    built = build_from(checkpoint, ARCH)
    assert (built.image_size, built.model.in_chans) == ((size, size), 1)
    assert same(network.state_dict(), built.model.state_dict())


def test_a_bare_state_dict_of_timm_needs_the_architecture(tmp_path: Path) -> None:
    network = create_model("resnet18", 9)
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", network.state_dict()))
    with pytest.raises(
        ValueError, match="does not say which architecture it is of, and none fits: name the architecture$"
    ):
        build_from(checkpoint)
    built = build_from(checkpoint, "resnet18")
    assert (built.num_classes, built.image_size) == (9, (224, 224))
    assert same(network.state_dict(), built.model.state_dict())


@pytest.mark.parametrize("arch", ["RepMLPNet-T224", "RepMLPNet-L256", "RepMLPNet-C100", "ResMLP-S24-224", "FaceResNet"])
@pytest.mark.parametrize("deploy", [False, True])
def test_fitting_architectures(arch: str, deploy: bool) -> None:
    with torch.device("meta"):
        state = create_model(arch, 11, deploy=deploy).state_dict()
    assert fitting_architectures(state) == [arch]
    del state[f"{classifier_name(arch)}.bias"]
    assert fitting_architectures(state) == []


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_keep_their_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network = create_model(ARCH, CLASSES).to(dtype)
    write_checkpoint(tmp_path / name, {"model": network.state_dict()})
    built = build_from(read_checkpoint(tmp_path / name))
    assert {p.dtype for p in built.model.parameters()} == {dtype}
    assert same(network.state_dict(), built.model.state_dict())


def test_an_unknown_architecture_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", weights))
    with pytest.raises(ValueError, match="unknown architecture 'RepMLPNet-Digit'; did you mean RepMLPNet-Digits"):
        build_from(checkpoint, "RepMLPNet-Digit")


def test_weights_without_a_head_are_of_a_network_that_never_had_one(weights: dict[str, Tensor], tmp_path: Path) -> None:
    headless = {name: value for name, value in weights.items() if not name.startswith("head.")}
    with pytest.raises(ValueError, match=r"a\.pth does not fit .*: 2 tensors missing \(head\.weight, \.\.\.\)"):
        build_from(read_checkpoint(saved(tmp_path / "a.pth", headless)), ARCH)
    network = create_model(ARCH, 0)
    network.load_state_dict(headless)
    meta = describe(ARCH, network, network.img_size, "train")
    built = build_from(read_checkpoint(saved(tmp_path / "b.pth", {"model": headless, "meta": meta})))
    assert (built.num_classes, same(headless, built.model.state_dict())) == (0, True)


# Loading


def test_weights_of_another_architecture_name_the_one_that_fits(weights: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", weights))
    with pytest.raises(ValueError, match="does not fit the network") as error:
        build_from(checkpoint, "RepMLPNet-C100")
    message = str(error.value)
    assert str(checkpoint.path) in message
    assert re.search(r"\d+ tensors missing \(stages\.0\.2\.\S+, \.\.\.\); \d+ tensors of another shape", message)
    assert f"These are train weights of {ARCH} with {CLASSES} classes at 16x16; the network takes" in message
    assert message.endswith(f": set MODEL.ARCH to {ARCH}")


def test_weights_for_another_number_of_classes(weights: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", weights))
    with pytest.raises(ValueError, match=r"2 tensors of another shape \(head.weight \(6, 64\), not \(4, 64\)") as error:
        load_weights(create_model(ARCH, 4), checkpoint)
    remedy = f"data of {CLASSES} classes, or set MODEL.NUM_CLASSES to {CLASSES}"
    network = f"train weights of {ARCH} with 4 classes at 16x16"
    assert str(error.value).endswith(
        f"{ARCH} with {CLASSES} classes at 16x16; the network takes {network}: give {remedy}"
    )


def test_weights_of_the_other_form(model: RepMLPNet, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", to_deploy(model).state_dict()))
    with pytest.raises(ValueError, match=r"tensors missing .*; 4 tensors unexpected") as error:
        load_weights(model, checkpoint)
    assert f"These are deploy weights of {ARCH} with {CLASSES} classes at 16x16" in str(error.value)
    assert str(error.value).endswith(": give the training weights that they were converted from")
    with pytest.raises(ValueError, match=r"These are train weights .* takes deploy weights .*: convert them first"):
        load_weights(to_deploy(model), read_checkpoint(saved(tmp_path / "b.pth", model.state_dict())))


@pytest.mark.parametrize(("size", "key"), [(24, "24"), ((16, 24), "16,24")])
def test_weights_for_another_image_size(size: int | tuple[int, int], key: str, tmp_path: Path) -> None:
    trained = create_model(ARCH, CLASSES, img_size=size)
    payload = {"model": trained.state_dict(), "meta": describe(ARCH, trained, to_2tuple(size), "train")}
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", payload))
    with pytest.raises(ValueError, match=r"of another shape") as error:
        load_weights(create_model(ARCH, CLASSES, img_size=32), checkpoint)
    assert f"with {CLASSES} classes at {'x'.join(map(str, to_2tuple(size)))}; " in str(error.value)
    assert str(error.value).endswith(f"with {CLASSES} classes at 32x32: set DATA.IMG_SIZE to {key}")


def test_weights_are_named_where_the_network_is_none_of_ours(weights: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", weights))
    with pytest.raises(ValueError, match=rf"\. These are train weights of {ARCH} with {CLASSES} classes at 16x16$"):
        load_weights(nn.Linear(2, 3), checkpoint)


def test_weights_of_a_changed_structure_are_named_by_what_the_file_says(tmp_path: Path) -> None:
    trained = create_model(ARCH, CLASSES, share_sets=(2, 8))
    meta = {"arch": ARCH, "image_size": [16, 16], "num_classes": CLASSES}
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", {"model": trained.state_dict(), "meta": meta}))
    with pytest.raises(ValueError, match=rf"These are train weights of {ARCH} with {CLASSES} classes at 16x16; the"):
        load_weights(create_model(ARCH, CLASSES), checkpoint)


def test_what_the_file_says_and_the_user_wants_otherwise(tmp_path: Path) -> None:
    trained = create_model(ARCH, CLASSES, img_size=24, share_sets=(2, 8))
    payload = {"model": trained.state_dict(), "meta": describe(ARCH, trained, (24, 24), "train")}
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", payload))
    assert build_from(checkpoint).image_size == (24, 24)
    assert build_from(checkpoint, img_size=(24, 24), share_sets=(2, 8)).image_size == (24, 24)
    with pytest.raises(ValueError, match="DATA.IMG_SIZE to 24"):
        build_from(checkpoint, img_size=(32, 32))
    with pytest.raises(ValueError, match="of another shape"):
        build_from(checkpoint, share_sets=(4, 16))
    bare = read_checkpoint(saved(tmp_path / "b.pth", trained.state_dict()))
    assert build_from(bare, ARCH, share_sets=(2, 8)).image_size == (24, 24)


@pytest.mark.parametrize("name", ["repmlpnet_digits", ARCH])
def test_our_names_and_those_of_timm_are_the_same(name: str, model: RepMLPNet, tmp_path: Path) -> None:
    payload = {"model": model.state_dict(), "meta": describe(ARCH, model, (16, 16), "train") | {"arch": name}}
    path = saved(tmp_path / "a.pth", payload)
    assert build_from(read_checkpoint(path)).arch == ARCH
    assert build_from(read_checkpoint(path), "repmlpnet_digits").arch == ARCH
    assert describe("repmlpnet_digits", model, (16, 16), "train")["arch"] == ARCH


# Weights and metadata that are not what they should be


def poisoned(weights: dict[str, Tensor], value: Tensor, name: str = "head.weight") -> dict[str, Tensor]:
    return weights | {name: value}


WRONG_VALUES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda w: w.clone().index_fill_(1, torch.tensor(3), torch.nan), "1 tensors hold NaN or infinite"),
    "infinite": (lambda w: torch.full_like(w, -torch.inf), "1 tensors hold NaN or infinite"),
    "integers": (lambda w: w.int(), "1 tensors hold torch.int32 in place of torch.float32"),
    "booleans": (lambda w: w > 0, "1 tensors hold torch.bool in place of torch.float32"),
    "complex": (lambda w: w.to(torch.complex64), "1 tensors hold torch.complex64 in place of torch.float32"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "1 tensors hold torch.float8_e4m3fn in place of torch.float32"),
}


@pytest.mark.parametrize("kind", WRONG_VALUES)
def test_values_that_no_network_can_have(kind: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    change, message = WRONG_VALUES[kind]
    path = saved(tmp_path / "a.pth", poisoned(weights, change(weights["head.weight"])))
    for load in (build_from, lambda c: load_weights(create_model(ARCH, CLASSES), c)):
        with pytest.raises(ValueError, match=rf"a\.pth can't be used: {message} .*\(?head\.weight, \.\.\.\)"):
            load(read_checkpoint(path))


def test_a_count_that_is_no_integer(weights: dict[str, Tensor], tmp_path: Path) -> None:
    name = next(name for name in weights if name.endswith("num_batches_tracked"))
    path = saved(tmp_path / "a.pth", poisoned(weights, torch.tensor(1.5), name))
    with pytest.raises(ValueError, match=r"hold torch\.float32 in place of torch\.int64"):
        build_from(read_checkpoint(path))


WRONG_TENSORS: dict[str, Callable[[Tensor], object]] = {
    "expanded": lambda w: torch.zeros(1).expand(10**12),
    "sparse": lambda w: w.to_sparse(),
    "compressed": lambda w: w.to_sparse_csr(),
    "meta": lambda w: w.to("meta"),
    "nested": lambda w: torch.nested.nested_tensor([w[0], w[1]]),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # some of these are beta or deprecated in torch
@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_tensors_without_elements_of_their_own(kind: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"model": weights | {"head.weight": WRONG_TENSORS[kind](weights["head.weight"])}})
    with pytest.raises(
        ValueError, match=r"a\.pth (holds no usable weights: head\.weight is |is damaged or no checkpoint)"
    ):
        read_checkpoint(path)


def test_containers_in_a_circle_and_names_of_thousands_of_prefixes(weights: dict[str, Tensor], tmp_path: Path) -> None:
    circle: dict = {}
    circle["model"] = circle
    with pytest.raises(ValueError, match="holds no weights: found 'model'"):
        read_checkpoint(saved(tmp_path / "a.pth", circle))
    path = saved(tmp_path / "b.pth", {"module." * 5000 + name: value for name, value in weights.items()})
    assert same(weights, read_checkpoint(path).state_dict)


def test_two_tensors_of_one_name(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", weights | {"module.head.bias": weights["head.bias"] + 1})
    with pytest.raises(ValueError, match="several tensors whose names differ in a prefix only"):
        read_checkpoint(path)


WRONG_META: list[dict[str, object]] = [
    {"arch": 7},
    {"arch": None},
    {"num_classes": "6"},
    {"num_classes": -1},
    {"num_classes": True},
    {"image_size": 16},
    {"image_size": [16]},
    {"image_size": [16, "16"]},
    {"image_size": [0, 16]},
    {"image_size": [10**9, 10**9]},
    {"image_size": {"height": 16}},
    {"form": "frozen"},
    {"form": ["train"]},
    {"structure": [("share_sets", 3)]},
    {"structure": {"share_sets": "4, 16"}},
    {"structure": {"share_sets": [4, 0]}},
    {"structure": {"share_sets": [4, 7]}},
    {"structure": {"share_sets": [4]}},
    {"structure": {"blocks": [10**4, 10**4]}},
    {"structure": {"blocks": [2.0, 2]}},
    {"structure": {"channels": [2**16, 2**16]}},
    {"structure": {"channels": []}},
    {"structure": {"patch_size": 0}},
    {"structure": {"patch_size": 2**16}},
    {"structure": {"branches": [2]}},
    {"structure": {"branches": [2**16 - 1]}},
    {"structure": {"gp_reduction": 2**16}},
    {"structure": {"ffn_expansion": -1}},
    {"structure": {"global_perceptron": 1}},
    {"structure": {"colour": "red"}},
    {"structure": {3: 4}},
    {"dataset": ["digits"]},
    {"weights": "raw"},
    {"task": 3},
    {"metric": 3},
    {"class_names": "ant"},
    {"class_names": {"ant": 0}},
    {"class_names": ["ant", 3]},
    {"class_names": ["ant", ["bee"]]},
    {"class_names": ["a" * 2000]},
    {"class_names": ["ant"] * 11},
    {"task": "segmentation", "network": {}},
]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("change", WRONG_META, ids=lambda change: str(change)[:60])
def test_metadata_of_wrong_types_or_sizes(
    change: dict[str, object], suffix: str, model: RepMLPNet, tmp_path: Path
) -> None:
    meta = describe(ARCH, model, (16, 16), "train") | change
    path = tmp_path / f"a.{suffix}"
    write_checkpoint(path, {"model": model.state_dict(), "meta": meta})
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        build_from(read_checkpoint(path))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("names", [["ant", "a\x1b", "\udcff"], ["ant"] * CLASSES, [], None], ids=str)
def test_names_of_classes_return(names: list[str] | None, suffix: str, model: RepMLPNet, tmp_path: Path) -> None:
    stored = None if names is None else storable_names(names)
    meta = describe(ARCH, model, (16, 16), "train", class_names=stored)
    write_checkpoint(tmp_path / f"a.{suffix}", {"model": model.state_dict(), "meta": meta})
    checkpoint = read_checkpoint(tmp_path / f"a.{suffix}")
    assert output_names(checkpoint, CLASSES) == names
    network = build_from(checkpoint).model
    assert isinstance(network, RepMLPNet)
    assert network.class_names == names


def test_names_that_could_not_be_read_again_are_not_stored() -> None:
    assert storable_names(["a" * 1024]) == ["a" * 1024]
    assert storable_names(["a" * 1025]) is None
    assert storable_names(["a" * 1024] * 2**14) is not None
    assert storable_names(["a" * 1024] * 2**14 + ["a"]) is None


@pytest.mark.parametrize("meta", [3, "text", ["arch"], None])
def test_metadata_that_are_no_dictionary(meta: object, weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.pth is damaged or of another program: meta is .*, not a dictionary"):
        read_checkpoint(saved(tmp_path / "a.pth", {"model": weights, "meta": meta}))


def test_a_file_that_was_chosen_by_its_average_is_used_so(weights: dict[str, Tensor], tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in weights.items()}
    payload = {"model": weights, "ema": average, "meta": {"weights": "ema"}}
    path = saved(tmp_path / "a.pth", payload)
    for ema, expected in ((None, average), (True, average), (False, weights)):
        checkpoint = read_checkpoint(path, ema=ema)
        assert same(expected, checkpoint.state_dict)
        assert checkpoint.averaged == (expected is average)
    assert str(read_checkpoint(path)) == f"averaged training weights from {path}"
    assert str(read_checkpoint(path, ema=False)) == f"training weights from {path}"
    other = saved(tmp_path / "b.pth", payload | {"meta": {"weights": "model"}})
    assert same(weights, read_checkpoint(other).state_dict)
    alone = saved(tmp_path / "c.pth", {"ema": average})
    assert read_checkpoint(alone).averaged
    with pytest.raises(ValueError, match="holds no weights: found 'ema'"):
        read_checkpoint(alone, ema=False)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_loading_is_strict_and_leaves_the_network_alone_where_it_fails(
    change: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(weights)
    name = "stages.1.0.prebn1.running_var"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state["stages.1.0.more"] = torch.ones(1)
    else:
        state[name] = torch.ones(63)
    network = create_model(ARCH, CLASSES)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    expected = {
        "missing": rf"1 tensors missing \({name}\)",
        "unexpected": r"1 tensors unexpected \(stages\.1\.0\.more\)",
        "shape": rf"1 tensors of another shape \({name} \(63,\), not \(64,\)\)",
    }
    with pytest.raises(ValueError, match=expected[change]):
        load_weights(network, read_checkpoint(saved(tmp_path / "a.pth", state)))
    assert same(before, network.state_dict())


@pytest.mark.parametrize("arch", [ARCH, "resnet18"])
def test_pretrained_weights_for_other_classes_leave_the_head_alone(arch: str, tmp_path: Path) -> None:
    trained, network = create_model(arch, CLASSES), create_model(arch, 4)
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", trained.state_dict()))
    head = {name: value.clone() for name, value in network.get_classifier().state_dict().items()}
    prefix = "head" if arch == ARCH else "fc"

    assert load_pretrained(arch, network, checkpoint) == [f"{prefix}.weight", f"{prefix}.bias"]

    assert same(head, network.get_classifier().state_dict())
    expected = {k: v for k, v in trained.state_dict().items() if not k.startswith(f"{prefix}.")}
    assert same(expected, {k: v for k, v in network.state_dict().items() if not k.startswith(f"{prefix}.")})


def test_pretrained_weights_for_the_same_classes_are_loaded_whole(weights: dict[str, Tensor], tmp_path: Path) -> None:
    network = create_model(ARCH, CLASSES)
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", weights))
    assert load_pretrained(ARCH, network, checkpoint) == []
    assert same(weights, network.state_dict())


def test_pretrained_weights_must_fit_but_for_the_head(weights: dict[str, Tensor], tmp_path: Path) -> None:
    state = {k: v for k, v in weights.items() if k != "embeds.0.bn.bias"}
    checkpoint = read_checkpoint(saved(tmp_path / "a.pth", state))
    with pytest.raises(ValueError, match=r"1 tensors missing \(embeds\.0\.bn\.bias\)"):
        load_pretrained(ARCH, create_model(ARCH, 4), checkpoint)


@pytest.mark.parametrize("name", ["RepMLPNet-Digits", "PureMLP-C10", "resnet18"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grey_image_gives_what_it_gives_as_rgb(name, dtype):
    model = create_model(name, 5).to(dtype).eval()
    size = default_image_size(name) if name in REGISTRY else (64, 64)
    checkpoint = adapt_input(name, Checkpoint(Path("a.pth"), model.state_dict(), None), 1)
    adapted = create_model(name, 5, in_chans=1).to(dtype).eval()
    adapted.load_state_dict(checkpoint.state_dict)
    image = torch.randn(2, 1, *size, dtype=dtype)
    with torch.no_grad():
        expected = model(image.expand(-1, 3, -1, -1))
        torch.testing.assert_close(adapted(image), expected)
    assert str(checkpoint).endswith(f"a.pth, for 1 channel ({first_conv_name(name)}.weight is the sum of that for 3)")
    assert checkpoint.meta == {"in_chans": 1}


def test_a_classifier_of_adapted_weights_is_built_from_them():
    """Its metadata do not say how images of three channels were normalised."""
    model = create_model(ARCH, 5)
    images = {"dataset": "digits", "in_chans": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    meta = describe(ARCH, model, (16, 16), "train", **images)
    network = build_from(adapt_input(ARCH, Checkpoint(Path("a.pth"), model.state_dict(), "train", meta), 4))
    assert network.in_chans == network.model.in_chans == 4
    assert network.model.statistics is None
    whole = build_from(Checkpoint(Path("a.pth"), model.state_dict(), "train", meta))
    assert whole.model.statistics == ((0.5,) * 3, (0.25,) * 3)


def test_weights_that_are_not_for_rgb_are_not_adapted():
    grey = Checkpoint(Path("a.pth"), create_model("resnet18", in_chans=1).state_dict(), None)
    assert adapt_input("resnet18", grey, 4) is grey
    rgb = Checkpoint(Path("a.pth"), create_model("resnet18").state_dict(), None)
    assert adapt_input("resnet18", rgb, 3) is rgb
    assert adapt_input(ARCH, rgb, 4) is rgb


def test_channels_of_a_network_of_timm_are_in_its_metadata():
    model = create_model("resnet18", 5, in_chans=4)
    meta = describe("resnet18", model, (64, 64), None, in_chans=4, mean=[0.5] * 4, std=[0.25] * 4)
    META("meta", meta)
    network = build_from(Checkpoint(Path("a.pth"), model.state_dict(), None, meta))
    assert network.in_chans == 4
    assert network.model(torch.zeros(1, 4, 64, 64)).shape == (1, 5)
