"""Exports a network for other runtimes: ONNX (`.onnx`) or a torch.export program (`.pt2`), of any batch size.

Training weights are converted by Locality Injection first. The exported program is run and compared with the
network before it is written. Where the checkpoint names its classes, so does the file: `class_names`, a list in JSON,
in the properties of an ONNX model or in the extra files of a torch.export program.

python -m tools.export output/RepMLPNet-Digits/quickstart/best_ckpt.pth digits.onnx --fuse
"""

import io
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.checkpoints import output_names
from models.files import write_atomically
from models.reparam import input_channels, relative_difference
from tasks.inference import add_checkpoint_options, load_checkpoint, prepare
from utils import cli
from utils.files import check_target
from utils.text import printable

if TYPE_CHECKING:  # an extra, which need not be there
    import onnx

Program = Callable[[Tensor], Tensor]
BATCH_SIZES = (2, 3)  # of the sample that is traced, and of the check


def parser() -> cli.Parser:
    """Describes the command line."""
    result = cli.Parser(description=__doc__, argument_default=None)
    result.add_argument("weights", metavar="WEIGHTS", help="checkpoint, training or deploy weights")
    result.add_argument("save", metavar="FILE", type=Path, help="file to write: NAME.onnx or NAME.pt2")
    add_checkpoint_options(result, fuse=True)
    result.add_argument("--tolerance", type=float, default=1e-4, help="largest relative logit difference")
    return result


def to_onnx(model: nn.Module, images: Tensor, properties: dict[str, str]) -> tuple[bytes, Program]:
    """Returns the ONNX file of a network, and a function that runs it.

    Args:
        model: in evaluation mode.
        images: (N, C, H, W), N at least 2; the exported network takes any N.
        properties: further metadata of the file.

    Raises:
        ValueError: the packages of the extra `onnx` are missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ValueError(f"exporting to ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import onnx
    import onnxruntime
    import onnxscript.optimizer

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        external_data=False,
        verbose=False,
        optimize=False,  # done below
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    assert program is not None
    # Tools that quantize need weights that are constants, not computed from constants: folded whatever their size.
    onnxscript.optimizer.optimize(program.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    proto = program.model_proto
    _forget_shapes_of_constants(proto.graph)
    onnx.helper.set_model_props(proto, properties)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _forget_shapes_of_constants(graph: "onnx.GraphProto") -> None:
    """Removes, in place, what repeats the shapes of constants; it is wrong once a tool has transposed one."""
    constants = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.value_info if value.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def to_pt2(model: nn.Module, images: Tensor, properties: dict[str, str]) -> tuple[bytes, Program]:
    """Returns the torch.export file of a network, and a function that runs it; arguments as of `to_onnx`."""
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=properties)
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


FORMATS = {".onnx": to_onnx, ".pt2": to_pt2}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Reads, converts, exports, verifies, writes."""
    args = parser().parse_args(argv)
    if args.save.suffix not in FORMATS:
        raise ValueError(f"{args.save}: the name must end in {' or '.join(FORMATS)}, which chooses the format")
    check_target(args.save, [args.weights])
    _, checkpoint, network = load_checkpoint(args.weights, args.arch, args.ema)
    model = prepare(network.model, torch.device("cpu"), deploy=True, fuse=args.fuse)
    traced, checked = (torch.randn(n, input_channels(network.model), *network.image_size) for n in BATCH_SIZES)
    names = output_names(checkpoint, network.num_classes)
    properties = {} if names is None else {"class_names": json.dumps(names)}
    content, program = FORMATS[args.save.suffix](model, traced, properties)
    difference = relative_difference(model(checked), program(checked))
    if not difference <= args.tolerance:
        raise ValueError(
            f"the exported program changes the logits by {difference:.1e}, more than {args.tolerance:.0e}, and nothing "
            "was written"
        )
    write_atomically(args.save, lambda file: file.write(content))
    print(printable(f"{network.arch}: {checkpoint} -> {args.save} ({len(content) / 1e6:.1f} MB)"))
    print(f"verified on random images: largest relative logit difference {difference:.1e}")


if __name__ == "__main__":
    cli.run(main)
