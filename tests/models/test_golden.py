"""The networks against numbers of the published implementation; every file in tests/golden is used."""

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import create_model
from models.checkpoints import build_from, read_checkpoint
from models.reparam import to_deploy

FOLDER = Path(__file__).parents[1] / "golden"
FILES = sorted(path for path in FOLDER.glob("*.json") if "train_keys" in json.loads(path.read_text()))
LABELS = torch.tensor([3, 7])  # of the two images, for the loss
EXACT = 1e-10  # relative, in float64
SINGLE = 1e-4  # relative, in float32


def _load_fill() -> Any:
    spec = importlib.util.spec_from_file_location("deterministic_fill", FOLDER / "deterministic_fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILL = _load_fill()


@dataclass
class Golden:
    """One file of golden values, and the logits that go with it."""

    values: dict[str, Any]
    logits: np.ndarray
    deploy_logits: np.ndarray

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


@dataclass
class Measured:
    """What this project computes under the same names; the networks themselves are gone, to spare memory."""

    params: int
    deploy_params: int
    train_keys: dict[str, list[int]]
    built_deploy_keys: dict[str, list[int]]
    injected_keys: dict[str, list[int]]
    logits: dict[torch.dtype, Tensor] = field(default_factory=dict)
    deploy_logits: dict[torch.dtype, Tensor] = field(default_factory=dict)
    loss: dict[torch.dtype, float] = field(default_factory=dict)
    grad_norms: dict[str, float] = field(default_factory=dict)
    running_norms: dict[str, float] = field(default_factory=dict)
    deploy_fc3: dict[str, tuple[float, float]] = field(default_factory=dict)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives each test the files that hold the value it is marked with."""
    if "golden" in metafunc.fixturenames:
        needed = {mark.args[0] for mark in metafunc.definition.iter_markers("golden")}
        files = [path for path in FILES if needed <= json.loads(path.read_text()).keys()]
        assert files, f"no file holds {needed}"
        # One process measures a network, where several run the tests.
        cases = [pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.stem)) for path in files]
        metafunc.parametrize("golden", cases, indirect=True, scope="module")


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    logits = np.load(request.param.with_suffix(".npz"))
    return Golden(json.loads(request.param.read_text()), logits["logits"], logits["deploy_logits"])


@pytest.fixture(scope="module")
def measured(golden: Golden) -> Measured:
    arch, size = golden["arch"], golden["image_size"]
    images = FILL.image_batch(arch, 2, size)
    with torch.device("meta"):
        built = create_model(arch, deploy=True)
    model = create_model(arch)
    params, deploy_params = (sum(p.numel() for p in network.parameters()) for network in (model, built))
    result = Measured(params, deploy_params, shapes(model), shapes(built), {})
    for dtype in (torch.float32, torch.float64):
        FILL.fill(model.to(dtype).eval())
        with torch.no_grad():
            result.logits[dtype] = model(images.to(dtype))
            deploy = to_deploy(model)
            result.deploy_logits[dtype] = deploy(images.to(dtype))
        if dtype is torch.float32:
            with torch.no_grad():
                result.loss[dtype] = F.cross_entropy(model.train()(images.to(dtype)), LABELS).item()
    state = deploy.state_dict()
    result.injected_keys = shapes(deploy)
    result.deploy_fc3 = {k: (v.norm().item(), v.flatten()[:7].sum().item()) for k, v in state.items() if ".fc3." in k}
    del deploy, state
    loss = F.cross_entropy(model.train()(images), LABELS)
    loss.backward()
    result.loss[torch.float64] = loss.item()
    result.grad_norms = {k: p.grad.norm().item() for k, p in model.named_parameters()}
    result.running_norms = {k: b.norm().item() for k, b in model.named_buffers() if ".running_" in k}
    return result


def test_there_are_golden_values() -> None:
    networks = {f"RepMLPNet-{size}" for size in ("T224", "B224", "T256", "D256")}
    assert {*networks, "RepMLP-Res50-light-224"} <= {path.stem for path in FILES}
    complete = {"train_mode_loss", "grad_norms", "running_norms_after_one_step", "deploy_fc3"}
    for path in FILES:
        assert path.stem not in networks or complete <= json.loads(path.read_text()).keys(), path.stem


def test_state_dict_names_shapes_and_order_of_the_training_form(golden: Golden, measured: Measured) -> None:
    assert list(measured.train_keys.items()) == list(golden["train_keys"].items())


def test_state_dict_names_shapes_and_order_of_the_deploy_form(golden: Golden, measured: Measured) -> None:
    expected = list(golden["deploy_keys"].items())
    assert list(measured.built_deploy_keys.items()) == expected
    assert list(measured.injected_keys.items()) == expected


def test_number_of_parameters(golden: Golden, measured: Measured) -> None:
    assert measured.params == golden["params"]


@pytest.mark.golden("deploy_params")
def test_number_of_deploy_parameters(golden: Golden, measured: Measured) -> None:
    assert measured.deploy_params == golden["deploy_params"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
def test_logits(golden: Golden, measured: Measured, dtype: torch.dtype, tolerance: float) -> None:
    for expected, actual in (
        (golden.logits, measured.logits[dtype]),
        (golden.deploy_logits, measured.deploy_logits[dtype]),
    ):
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        assert np.abs(actual.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.golden("train_mode_loss")
def test_loss_in_training_mode(golden: Golden, measured: Measured) -> None:
    expected = golden["train_mode_loss"]
    assert measured.loss[torch.float64] == pytest.approx(expected, rel=EXACT)
    assert measured.loss[torch.float32] == pytest.approx(expected, rel=SINGLE)


@pytest.mark.golden("grad_norms")
def test_norm_of_every_gradient(golden: Golden, measured: Measured) -> None:
    expected = golden["grad_norms"]
    # Some gradients are zero but for rounding: a shift before a BatchNorm, a scale before one.
    floor = 1e-13 * max(expected.values())
    assert measured.grad_norms == pytest.approx(expected, rel=EXACT, abs=floor)


@pytest.mark.golden("running_norms_after_one_step")
def test_running_statistics_after_one_step(golden: Golden, measured: Measured) -> None:
    assert measured.running_norms == pytest.approx(golden["running_norms_after_one_step"], rel=EXACT, abs=0)


@pytest.mark.golden("deploy_fc3")
def test_injected_kernels(golden: Golden, measured: Measured) -> None:
    expected = golden["deploy_fc3"]
    assert measured.deploy_fc3.keys() == expected.keys()
    for name, (norm, start) in expected.items():
        assert measured.deploy_fc3[name][0] == pytest.approx(norm, rel=EXACT), name
        assert measured.deploy_fc3[name][1] == pytest.approx(start, rel=EXACT, abs=1e-13 * norm), name


MMPRETRAIN_KEYS = json.loads((FOLDER / "mmpretrain_base_224_keys.json").read_text())
# MMPretrain's words for the published ones, as tests/golden/README.md lists them, in the order of their application.
MMPRETRAIN_WORDS = (
    ("backbone.patch_embed.projection", "conv_embedding.conv"),
    ("backbone.patch_embed.norm", "conv_embedding.bn"),
    ("backbone.downsample_layers", "embeds"),
    ("backbone.final_norm", "head_norm"),
    ("backbone.", ""),
    ("gp.conv1.conv", "gp.fc1"),
    ("gp.conv2.conv", "gp.fc2"),
    (".norm1", ".prebn1"),
    (".norm2", ".prebn2"),
    ("head.fc", "head"),
)


def published_name(name: str) -> str:
    for theirs, published in MMPRETRAIN_WORDS:
        name = name.replace(theirs, published)
    return name


@pytest.mark.parametrize(("entry", "form"), [("224", "train"), ("224_deploy", "deploy")])
def test_mmpretrain_names_are_read_and_load_strictly(entry: str, form: str, tmp_path: Path) -> None:
    # Every tensor holds a number of its own; expanded, so that the file stays small.
    state = {
        name: torch.tensor(number if name.endswith("num_batches_tracked") else float(number)).expand(shape)
        for number, (name, shape) in enumerate(MMPRETRAIN_KEYS[entry].items())
    }
    torch.save({"meta": {"epoch": 300, "experiment_name": "x"}, "state_dict": state}, tmp_path / "base.pth")

    checkpoint = read_checkpoint(tmp_path / "base.pth")
    assert checkpoint.form == form
    network = build_from(checkpoint)

    assert (network.arch, network.num_classes, network.image_size) == ("RepMLPNet-B224", 1000, (224, 224))
    loaded = network.model.state_dict()
    assert len(loaded) == len(state)
    for name, value in state.items():
        assert torch.equal(loaded[published_name(name)], value), name
