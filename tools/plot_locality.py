"""Draws what Locality Injection adds to an FC kernel: the values around one output point, before and after.

A value stands for the weight between an output point and an input point. Colours show the natural logarithm of its
magnitude over that of the smallest one. The square is the largest local kernel, the dashed one the output point; points
outside of the kernel that are larger than the median within are marked. The kernel before injection has the BatchNorm
of FC3 folded in, so that values outside of the square are the same in both.

python -m tools.plot_locality output/RepMLPNet-Digits/quickstart/best_ckpt.pth locality.png
"""

import io
from collections.abc import Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from models.files import write_atomically
from models.layers import PartitionBlock, PartitionConv
from models.locality import LocalityLinear
from models.reparam import fold_batch_norm
from tasks.inference import add_checkpoint_options, load_checkpoint
from utils import cli
from utils.files import check_target
from utils.text import printable

if TYPE_CHECKING:  # an extra, which need not be there
    from matplotlib.axes import Axes

Block = PartitionBlock | LocalityLinear


class Locality(NamedTuple):
    """The weights of one output point.

    Attributes:
        before: FC3's own values (h, w), float64.
        after: those of the FC that equals FC3 and the branches.
        point: (y, x) of the output.
        kernel_size: of the largest local kernel.
        kernel: which kernel of the block it is, in words.
    """

    before: Tensor
    after: Tensor
    point: tuple[int, int]
    kernel_size: int
    kernel: str

    @property
    def within(self) -> Tensor:
        """Returns which points (h, w) the largest local kernel reaches."""
        rows, columns = (
            (torch.arange(n) - at).abs() <= self.kernel_size // 2
            for n, at in zip(self.before.shape, self.point, strict=True)
        )
        return rows[:, None] & columns

    def marked(self, values: Tensor) -> Tensor:
        """Returns which points (h, w) outside are larger in magnitude than the median of those within."""
        return ~self.within & (values.abs() > values[self.within].abs().median())


def parser() -> cli.Parser:
    """Describes the command line."""
    result = cli.Parser(description=__doc__, argument_default=None)
    result.add_argument("weights", metavar="WEIGHTS", help="checkpoint with training weights")
    result.add_argument("save", metavar="FILE", type=Path, help="picture to write: NAME.png")
    add_checkpoint_options(result)
    result.add_argument("--block", metavar="NAME", help="block, or a part with blocks; default: the first block")
    result.add_argument("--output-channel", type=int, default=0, metavar="N", help="output channel, or share-set")
    result.add_argument("--input-channel", type=int, default=0, metavar="N", help="input channel within the group")
    result.add_argument("--point", type=int, nargs=2, metavar=("Y", "X"), help="from 0; default: the centre")
    return result


def find_block(network: nn.Module, name: str | None) -> tuple[str, Block]:
    """Returns the first block with local branches in a part of a network, and its name.

    Raises:
        ValueError: there is none.
    """
    blocks = {key: module for key, module in network.named_modules() if isinstance(module, Block) and module.branches}
    if not blocks:
        raise ValueError("the network has no local branches to inject: give training weights of one that has")
    for key, block in blocks.items():
        if name is None or f"{key}.".startswith(f"{name}."):
            return key, block
    raise ValueError(f"--block {name} has no local branches: choose one of {', '.join(blocks)}")


@torch.no_grad()
def kernels(block: Block) -> tuple[Tensor, Tensor]:
    """Returns a block's FC kernel before and after injection, float64.

    Both are (O, h, w, I, h, w): output channel or share-set, its point, input channel within the group, its point.
    """
    block = deepcopy(block).double()
    if isinstance(block, LocalityLinear):
        (h, w), before, after = block.size, block.weight, block.get_equivalent_linear()[0]
    else:
        if isinstance(block.fc3, PartitionConv):
            raise ValueError("the block has a convolution in place of FC3: there is no FC kernel to draw")
        assert isinstance(block.fc3_bn, nn.modules.batchnorm._BatchNorm)
        h, w, weight = block.h, block.w, block.fc3.weight.flatten(1)
        before, after = fold_batch_norm(weight, None, block.fc3_bn)[0], block.get_equivalent_fc3()[0]
    shape = -1, h, w, before.shape[1] // (h * w), h, w
    return before.reshape(shape), after.reshape(shape)


def locality(
    block: Block, point: tuple[int, int] | None = None, output_channel: int = 0, input_channel: int = 0
) -> Locality:
    """Returns the weights of one output point of a block; None for the point at (h // 2, w // 2).

    Raises:
        ValueError: the block has no such point or channel.
    """
    before, after = kernels(block)
    outputs, h, w, inputs = before.shape[:4]
    y, x = point or (h // 2, w // 2)
    for flag, value, count in (
        ("--point Y", y, h),
        ("--point X", x, w),
        ("--output-channel", output_channel, outputs),
        ("--input-channel", input_channel, inputs),
    ):
        if not 0 <= value < count:
            raise ValueError(f"{flag} is {value}: the block has {count}, give 0 to {count - 1}")
    at = output_channel, y, x, input_channel
    kernel = f"share-set {output_channel}"
    if inputs > 1:
        kernel = f"output channel {output_channel}, input channel {input_channel} of its group"
    return Locality(before[at], after[at], (y, x), max(block.branches), kernel)


def log_magnitudes(values: Tensor) -> Tensor:
    """Returns ln of the magnitude over the smallest one; a zero counts as the smallest that is not zero.

    Raises:
        ValueError: all are zero, or one is not finite.
    """
    magnitudes = values.abs()
    if not magnitudes.isfinite().all() or not magnitudes.any():
        raise ValueError("the kernel is zero or not finite around this point: choose another one")
    smallest = magnitudes[magnitudes > 0].min()
    return (magnitudes.clamp(min=smallest) / smallest).log()


def draw(shown: Locality, title: str) -> bytes:
    """Draws both kernels side by side; returns the PNG."""
    from matplotlib.figure import Figure

    panels = {"before injection": shown.before, "after injection": shown.after}
    maps = {name: log_magnitudes(values) for name, values in panels.items()}
    largest = max(float(values.max()) for values in maps.values())
    figure = Figure(figsize=(9.4, 5.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(maps[name].numpy(), cmap="viridis", vmin=0, vmax=largest)
        _draw_points(axis, shown, values)
        means = [
            f"{float(values[where].abs().mean()):.3g} {part}"
            for part, where in (("within", shown.within), ("outside", ~shown.within))
            if where.any()
        ]
        axis.set_title(f"{name}\nmean |weight|: {', '.join(means)}", fontsize=10)
        axis.set_xlabel("x of the input point")
    axes[0].set_ylabel("y of the input point")
    figure.colorbar(image, ax=axes, label="ln(|weight| / smallest |weight| of the picture)", shrink=0.85)
    figure.suptitle(title, fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _draw_points(axis: "Axes", shown: Locality, values: Tensor) -> None:
    """Draws squares: the largest local kernel, cut off at the edges, and the output point; marks points outside."""
    from matplotlib.patches import Rectangle

    rows, columns = (where.tolist() for where in shown.within.nonzero().T)
    corner, size = (columns[0] - 0.5, rows[0] - 0.5), (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    k = shown.kernel_size
    axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="red", linewidth=2, label=f"{k}x{k} kernel"))
    y, x = shown.point
    dashed = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linestyle="--", linewidth=1.5)
    dashed.set_label("output point")
    axis.add_patch(dashed)
    rows, columns = (where.tolist() for where in shown.marked(values).nonzero().T)
    label = "outside, larger than the median within"
    axis.plot(columns, rows, "o", color="white", markeredgecolor="black", markersize=4, label=label)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the weights, draws, writes."""
    args = parser().parse_args(argv)
    if args.save.suffix != ".png":
        raise ValueError(f"{args.save}: the name must end in .png")
    if find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install 'matplotlib>=3.8' (the extra `plot`)")
    check_target(args.save, [args.weights])
    _, checkpoint, network = load_checkpoint(args.weights, args.arch, args.ema)
    name, block = find_block(network.model, args.block)
    shown = locality(block, args.point and tuple(args.point), args.output_channel, args.input_channel)
    title = f"FC kernel of {name}, {network.arch}\n{shown.kernel}, output point (y, x) = {shown.point}"
    content = draw(shown, title)
    write_atomically(args.save, lambda file: file.write(content))
    print(printable(f"{name} of {network.arch}, {checkpoint} -> {args.save}"))


if __name__ == "__main__":
    cli.run(main)
