"""`tools.export`: the answers of the network in another runtime, also fused."""

import io

import numpy as np
import onnxruntime
import pytest
import torch

from models.checkpoints import build_from, read_checkpoint


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
    else:
        program = torch.export.load(io.BytesIO(path.read_bytes())).module()
    for n in (1, 5):
        images = torch.randn(n, 3, 16, 16)
        if suffix == ".onnx":
            logits = torch.from_numpy(np.asarray(session.run(None, {"images": images.numpy()})[0]))
        else:
            logits = program(images)
        with torch.no_grad():
            torch.testing.assert_close(logits, network.model(images), rtol=1e-4, atol=1e-4)


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
