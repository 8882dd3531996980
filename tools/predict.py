"""Classifies image files: prints the most probable classes of each.

Unreadable files are reported on stderr, and the exit status is then 2.

python -m tools.predict output/RepMLPNet-Digits/quickstart/deploy.pth IMAGE...
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from PIL.Image import Image
from timm.layers import to_2tuple
from torch import Tensor, nn

import data
from data.class_names import numbered, read_class_names
from data.transforms import Transform
from engine.backends import set_tf32
from models.checkpoints import Checkpoint, output_names, statistics_in
from tasks.classification import Classification
from tasks.inference import add_checkpoint_options, default_device, load_checkpoint, prepare
from tasks.prediction import normalization, probabilities, read_image
from utils import cli
from utils.files import check_target, write_json
from utils.memory import clear_about_memory
from utils.text import printable


def parser() -> cli.Parser:
    """Describes the command line."""
    result = cli.Parser(description=__doc__, argument_default=None)
    result.add_argument("weights", metavar="WEIGHTS", help="checkpoint, training or deploy weights")
    result.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="image files")
    add_checkpoint_options(result, fuse=True)
    result.add_argument("-b", "--batch-size", type=int, default=16, metavar="N", help="images per batch")
    result.add_argument("-k", "--top", type=int, default=5, metavar="N", help="number of classes to print")
    result.add_argument(
        "-r", "--resolution", type=cli.side, metavar="R", help="image size; default: that of the network"
    )
    result.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names, one a line; default: the checkpoint's"
    )
    result.add_argument(
        "--dataset",
        metavar="NAME",
        help=f"trained on, {', '.join(data.known_names())}; default: that of the checkpoint, or imagenet",
    )
    result.add_argument("--crop", action="store_true", default=False, help="resize to 256/224 of the size, then crop")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the probabilities to this file")
    return result


def readable(paths: Iterable[Path], channels: int, unreadable: list[Path]) -> Iterator[tuple[Path, Image]]:
    """Yields the images with these channels; reports unreadable files on stderr and adds them to `unreadable`."""
    for path in paths:
        try:
            image = read_image(path, channels)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            cli.print_error(printable(f"{path}: {reason}"))
            unreadable.append(path)
        else:
            yield path, image


def normalization_of(checkpoint: Checkpoint, dataset: str | None, channels: int) -> data.Normalize:
    """Returns the normalization of the images of a data set, or where none is given of those that weights are for."""
    trained = statistics_in(checkpoint, channels)
    if trained and not dataset:
        return data.Normalize(*trained)
    try:
        return normalization(dataset or checkpoint.meta.get("dataset"), channels)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}: say --dataset") from None


def classified(
    model: nn.Module,
    images: Iterator[tuple[Path, Image]],
    transform: Transform,
    normalize: data.Normalize,
    batch_size: int,
) -> Iterator[tuple[Path, Tensor]]:
    """Yields each image's path with its probabilities (classes,), on the CPU."""
    while batch := [(path, transform(image)) for path, image in islice(images, batch_size)]:
        paths, pixels = zip(*batch, strict=True)
        with clear_about_memory("lower -b"):
            found = probabilities(model, torch.stack(pixels), normalize)
        yield from zip(paths, found, strict=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the weights, classifies, prints; returns the exit status."""
    args = parser().parse_args(argv)
    if args.batch_size < 1 or args.top < 1:
        raise ValueError("-b and -k must be at least 1")
    if args.json:
        images = [path for path in args.images if not path.is_dir()]  # a folder is not an image and not read
        check_target(args.json, filter(None, [args.weights, *images, args.classes]))
    device = default_device()
    set_tf32(False)
    if args.dataset:
        data.spec_of(args.dataset)  # raises ValueError for an unknown one
    task, checkpoint, network = load_checkpoint(args.weights, args.arch, args.ema)
    if task is not Classification:
        raise ValueError(f"{args.weights} is of the task {task.name}, whose networks name no classes")
    normalize = normalization_of(checkpoint, args.dataset, network.in_chans).to(device)
    outputs = network.num_classes
    names = (
        read_class_names(args.classes, outputs)
        if args.classes
        else numbered(output_names(checkpoint, outputs), outputs)
    )
    model = prepare(network.model, device, fuse=args.fuse)
    size = to_2tuple(args.resolution or network.image_size)
    transform = data.eval_transform(size, crop=args.crop)
    unreadable: list[Path] = []
    decoded = readable(args.images, network.in_chans, unreadable)
    figures: dict[str, list[tuple[str, float]]] = {}
    for path, values in classified(model, decoded, transform, normalize, min(args.batch_size, len(args.images))):
        best = values.topk(min(args.top, len(names)))
        labels = [names[i] for i in best.indices.tolist()]
        figures[str(path)] = list(zip(labels, best.values.tolist(), strict=True))
        print(printable(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in figures[str(path)])))
    if figures:  # on stderr, because programs read stdout
        print(printable(f"by {checkpoint}"), file=sys.stderr)
    if args.json:
        write_json(args.json, figures)
    return cli.USER_ERROR if unreadable else 0


if __name__ == "__main__":
    cli.run(main)
