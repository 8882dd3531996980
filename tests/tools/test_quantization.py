"""The exported ONNX files quantize by the tools of ONNX Runtime, as `docs/quantization.md` shows."""

import logging
import re
from pathlib import Path

import onnx
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from tools import export

# The exporters of some versions of torch warn of themselves.
pytestmark = pytest.mark.filterwarnings("default")
ROOT = Path(__file__).parents[2]
RECIPE = f"{ROOT}/configs/quickstart.yaml"
MARGIN = 1.5  # points of top-1; the largest loss measured is one of 359 test images, 0.28 points
FORMS = {"plain": [], "fused": ["--fuse"]}


@pytest.fixture(scope="module")
def program():
    """The program of the document, as a name space."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/quantization.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names = {"__name__": "quantize"}
    exec(compile(code, "quantize.py", "exec"), names)
    return names


@pytest.fixture(scope="module")
def task(program):
    cfg = program["parse"](["--cfg", RECIPE]).config
    return program["TASKS"][cfg.TASK](cfg, program["RankInfo"](0, 1, 0, program["CPU"]))


@pytest.fixture(scope="module")
def weights(train):
    """A network of a few epochs."""
    return train(f"--cfg {RECIPE} --opts TRAIN.EPOCHS 5 TRAIN.WARMUP_EPOCHS 1").folder / "best_ckpt.pth"


@pytest.fixture(scope="module", params=FORMS)
def exported(request, weights, tmp_path_factory):
    """The same, exported."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export.main([str(weights), str(path), *FORMS[request.param]])
    return path


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Without the advice of these tools, which they log."""
    caplog.set_level(logging.ERROR)


def top1(printed):
    """The figures that the program of the document prints: before and after."""
    return [float(figure) for figure in re.findall(r"Acc@1 ([\d.]+)", printed)]


def test_the_documented_program_keeps_the_accuracy(exported, program, capsys, tmp_path):
    program["main"](str(exported), str(tmp_path / "quantized.onnx"), "--cfg", RECIPE)
    before, after = top1(capsys.readouterr().out)
    assert before > 90
    assert after > before - MARGIN
    types = {node.op_type for node in onnx.load(tmp_path / "quantized.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types


@pytest.mark.parametrize(
    ("prepared", "per_channel"),
    [
        pytest.param(False, True, id="as exported, per channel"),
        pytest.param(True, False, id="prepared, per tensor"),
        pytest.param(False, False, id="as exported, per tensor", marks=pytest.mark.slow),
        pytest.param(True, True, id="prepared, per channel", marks=pytest.mark.slow),
    ],
)
def test_every_tool_takes_the_file_with_and_without_preparation(
    exported, prepared, per_channel, program, task, tmp_path
):
    source, size = exported, program["Network"](exported).image_size
    if prepared:
        source = tmp_path / "prepared.onnx"
        quant_pre_process(exported, source)
    static, dynamic = tmp_path / "static.onnx", tmp_path / "dynamic.onnx"
    quantize_static(source, static, program["Calibration"](task, size), per_channel=per_channel)
    quantize_dynamic(source, dynamic, per_channel=per_channel)
    before = program["accuracy"](exported, task).top1
    for path in (static, dynamic):
        assert program["accuracy"](path, task).top1 > before - MARGIN, path.name
        assert program["Network"](path)(torch.zeros(1, 3, *size)).shape == (1, 10)


def test_weights_are_constants_and_none_is_left_of_a_product(exported):
    graph = onnx.load(exported).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(products) == 23
    for node in products:
        assert node.input[0] not in constants
        assert all(name in constants for name in node.input[1:]), node.name
    for node in graph.node:
        assert any(name not in constants for name in node.input), f"{node.name} computes a constant"
    assert not {value.name for value in graph.value_info} & constants.keys()


def test_the_kernels_of_the_fc_have_a_scale_for_each_output(exported, program, task, tmp_path):
    quantize_static(exported, tmp_path / "q.onnx", program["Calibration"](task, (16, 16), batches=1), per_channel=True)
    graph = onnx.load(tmp_path / "q.onnx").graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    of_kernel = {
        tuple(constants[node.input[0]].dims): constants[node.input[1]].dims[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and len(constants.get(node.input[0], onnx.TensorProto()).dims) == 4
    }
    assert of_kernel[(4 * 64, 64, 1, 1)] == 4 * 64
    assert of_kernel[(16 * 16, 16, 1, 1)] == 16 * 16
