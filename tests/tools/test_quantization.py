"""The exported ONNX files quantize by the tools of ONNX Runtime, as `docs/quantization.md` shows."""

import logging
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

ROOT = Path(__file__).parents[2]
RECIPE = f"{ROOT}/configs/quickstart.yaml"
# The largest loss of top-1 that was measured on the 359 test images is LARGEST_LOSS; one image is 0.28 points.
MARGIN = 1.5
FORMS = {"plain": [], "fused": ["--fuse"]}


@pytest.fixture(scope="module")
def script():
    """The program of the document, as a name space."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/quantization.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names = {"__name__": "quantize"}
    exec(compile(code, "quantize.py", "exec"), names)
    return names


@pytest.fixture(scope="module")
def task(script):
    cfg = script["parse"](["--cfg", RECIPE]).config
    return script["TASKS"][cfg.TASK](cfg, script["RankInfo"](0, 1, 0, script["CPU"]))


@pytest.fixture(scope="module", params=FORMS)
def exported(request, user, trained, tmp_path_factory):
    """A network of the short training, exported."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    result = user("-m", "tools.export", trained.folder / "best_ckpt.pth", path, *FORMS[request.param], folder=ROOT)
    assert result.status == 0, result.err
    return path


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Without the advice of these tools, which they log."""
    caplog.set_level(logging.ERROR)


def top1(printed):
    """The figures that the program of the document prints: before and after."""
    return [float(figure) for figure in re.findall(r"Acc@1 ([\d.]+)", printed)]


def test_the_documented_program_keeps_the_accuracy(exported, script, capsys, tmp_path):
    script["main"](str(exported), str(tmp_path / "quantized.onnx"), "--cfg", RECIPE)
    before, after = top1(capsys.readouterr().out)
    assert before > 90
    assert after > before - MARGIN
    types = {node.op_type for node in onnx.load(tmp_path / "quantized.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types


@pytest.mark.parametrize("prepared", [False, True], ids=["as exported", "prepared"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_every_tool_takes_the_file_with_and_without_preparation(
    exported, prepared, per_channel, script, task, tmp_path
):
    source, size = exported, script["Network"](exported).image_size
    if prepared:
        source = tmp_path / "prepared.onnx"
        quant_pre_process(exported, source)
    static, dynamic = tmp_path / "static.onnx", tmp_path / "dynamic.onnx"
    quantize_static(source, static, script["Calibration"](task, size), per_channel=per_channel)
    quantize_dynamic(source, dynamic, per_channel=per_channel)
    before = script["accuracy"](exported, task).top1
    for path in (static, dynamic):
        assert script["accuracy"](path, task).top1 > before - MARGIN, path.name
        assert session_answers(path, 1).shape == (1, 10)


def session_answers(path, n):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": np.zeros((n, 3, 16, 16), np.float32)})[0]


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


def test_the_kernels_of_the_fc_have_a_scale_for_each_output(exported, script, task, tmp_path):
    quantize_static(exported, tmp_path / "q.onnx", script["Calibration"](task, (16, 16), batches=1), per_channel=True)
    graph = onnx.load(tmp_path / "q.onnx").graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    of_kernel = {
        tuple(constants[node.input[0]].dims): constants[node.input[1]].dims[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and len(constants.get(node.input[0], onnx.TensorProto()).dims) == 4
    }
    assert of_kernel[(4 * 64, 64, 1, 1)] == 4 * 64
    assert of_kernel[(16 * 16, 16, 1, 1)] == 16 * 16
