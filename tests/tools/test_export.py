"""`tools.export`: the answers of the network in another runtime, also fused."""

import io
import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from models.checkpoints import build_from, read_checkpoint
from models.reparam import randomize_statistics, to_deploy
from models.repmlp_resnet import SPECS, RepMLPResNet
from tools.export import to_onnx, to_pt2


@pytest.mark.filterwarnings("default")  # the exporters of some versions of torch warn of themselves
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_exported_network_answers_as_the_deployed_one_at_any_batch_size(suffix, fuse, trained, call, tmp_path):
    path, weights = tmp_path / f"digits{suffix}", trained.folder / "best_ckpt.pth"
    status, out, _ = call("tools/export.py", weights, path, *["--fuse"] * fuse)
    assert status == 0
    assert "verified on random images" in out
    network = build_from(read_checkpoint(weights))
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        extra = session.get_modelmeta().custom_metadata_map
    else:
        extra = {"class_names": ""}
        program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra).module()
    assert json.loads(extra["class_names"]) == [str(digit) for digit in range(10)]
    for n in (1, 5):
        images = torch.randn(n, 3, 16, 16)
        if suffix == ".onnx":
            logits = torch.from_numpy(np.asarray(session.run(None, {"images": images.numpy()})[0]))
        else:
            logits = program(images)
        with torch.no_grad():
            torch.testing.assert_close(logits, network.model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("convert", [to_onnx, to_pt2])
@torch.no_grad()
def test_the_first_repmlp_is_exported_for_any_batch_size(convert):
    spec = replace(SPECS["RepMLP-Res50-light-224"], channels=(64, 128, 256, 512), blocks=(1, 2, 1, 1))
    model = RepMLPResNet(spec, num_classes=10).eval()
    randomize_statistics(model)
    model = to_deploy(model)
    images = torch.randn(3, 3, 224, 224)
    _, program = convert(model, images[:2], {})
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)


def test_export_writes_nothing_where_the_format_is_unknown_or_the_check_fails(trained, call, tmp_path):
    weights = trained.folder / "best_ckpt.pth"
    for name, flags, message in (
        ("a.pb", [], "must end in .onnx or .pt2"),
        ("a.pt2", ["--tolerance", -1], "the exported program changes the logits by"),
    ):
        status, _, err = call("tools/export.py", weights, tmp_path / name, *flags)
        assert status == 2
        assert message in err
    assert list(tmp_path.iterdir()) == []
