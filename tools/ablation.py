"""Trains variants of small networks on the rendered shapes, each with several seeds, and prints an ablation table.

Trainings run in separate processes, several at a time. Finished trainings are not repeated, stopped ones resume.
Every figure is the top-1 of the last epoch on the 2,000 test images, not that of the best epoch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from yacs.config import CfgNode

from benchmarks.harness import chosen
from configs import flatten, load_config
from configs.command_line import parse
from engine.run import run_folder
from utils import cli

RECIPE = "configs/shapes.yaml"
# Several processes share the cores, so that each uses one thread.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
REP, RES = "RepMLPNet-Shapes", "ResMLP-Shapes"


class Variant(NamedTuple):
    """A row of the table.

    Attributes:
        part: the part of the network that is varied.
        arch: architecture.
        name: name of the variant; arch and name together are unique.
        opts: keys and values as in `--opts`; empty for the unchanged network.
        published: top-1 in % of the paper's CIFAR-100 network with the same branches, if any.
    """

    part: str
    arch: str
    name: str
    opts: str = ""
    published: float | None = None

    @property
    def title(self) -> str:
        """The unique name."""
        return f"{self.arch} {self.name}"


VARIANTS = (
    Variant("branches", REP, "none", "MODEL.BRANCHES []", 59.07),
    Variant("branches", REP, "1x1", "MODEL.BRANCHES [1]", 60.73),
    Variant("branches", REP, "3x3", "MODEL.BRANCHES [3]", 65.36),
    Variant("branches", REP, "1x1 and 3x3", published=67.43),
    Variant("branches", RES, "none", "MODEL.BRANCHES []", 55.58),
    Variant("branches", RES, "1x1", "MODEL.BRANCHES [1]", 57.96),
    Variant("branches", RES, "3x3", "MODEL.BRANCHES [3]", 63.76),
    Variant("branches", RES, "1x1 and 3x3", "MODEL.BRANCHES [1,3]", 65.09),
    # Compared with the unchanged network: both branches, 4 and 16 sets, with Global Perceptron.
    Variant("share-sets", REP, "1 and 1 sets", "MODEL.SHARE_SETS [1,1]"),
    Variant("share-sets", REP, "16 and 48 sets", "MODEL.SHARE_SETS [16,48]"),
    Variant("share-sets", REP, "a set a channel", "MODEL.SHARE_SETS [48,96]"),
    Variant("Global Perceptron", REP, "no Global Perceptron", "MODEL.GLOBAL_PERCEPTRON False"),
)


def _settings(cfg: CfgNode) -> dict[str, object]:
    """Returns every key that affects a training, which is all but the output folder."""
    return {key: value for key, value in flatten(cfg).items() if key != "OUTPUT"}


class Run(NamedTuple):
    """One training of a variant: the seed, its arguments for `main_repmlp.py`, and the resulting configuration."""

    variant: Variant
    seed: int
    arguments: list[str]
    cfg: CfgNode

    @property
    def folder(self) -> Path:
        """Where it writes to."""
        return run_folder(self.cfg, self.cfg.MODEL.ARCH)

    @property
    def checkpoint(self) -> Path:
        """The file that a training writes last."""
        return self.folder / f"ckpt_epoch_{self.cfg.TRAIN.EPOCHS - 1}.pth"

    def top1(self) -> float | None:
        """Returns the accuracy after the last epoch, in %, or None if the training has not finished.

        Raises:
            ValueError: the folder holds a training with another configuration.
        """
        folder = self.folder
        if (folder / "config.yaml").exists() and _settings(load_config(folder / "config.yaml")) != _settings(self.cfg):
            raise ValueError(f"{folder} holds a training with other settings: give another --output")
        if not self.checkpoint.exists():
            return None
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        last = {"kind": "eval", "epoch": self.cfg.TRAIN.EPOCHS - 1}
        return next(record["top1"] for record in records if last.items() <= record.items())


def run_of(variant: Variant, seed: int, output: Path, opts: Sequence[str]) -> Run:
    """Builds the command line of a training; `opts` are further keys and values for all trainings."""
    tag = f"{variant.name.replace(' ', '_')}-seed{seed}"
    arguments = ["--cfg", RECIPE, "--arch", variant.arch, "--output", str(output), "--tag", tag]
    arguments += ["--opts", "SEED", str(seed), *variant.opts.split(), *opts]
    return Run(variant, seed, arguments, parse(arguments).config)


def call(*words: object) -> None:
    """Runs one of the project's scripts with one thread.

    Raises:
        ValueError: the script failed; the message holds its last line.
    """
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        raise ValueError(f"{' '.join(map(str, words))} ended with status {done.returncode}: {last}")


def train(run: Run) -> None:
    """Runs a training to the end and prints its accuracy."""
    call("main_repmlp.py", *run.arguments)
    print(f"{run.variant.title}, seed {run.seed}: {run.top1():.2f} %", flush=True)


def train_missing(runs: Sequence[Run], jobs: int) -> None:
    """Runs the unfinished trainings, `jobs` at a time; after a failure no further one is started."""
    missing = [run for run in runs if run.top1() is None]
    print(f"{len(runs) - len(missing)} of {len(runs)} trainings are finished", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for _ in pool.map(train, missing):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def line(*cells: str) -> str:
    """Formats a line of the Markdown table."""
    part, arch, name, *figures = cells
    return f"| {part:<17} | {arch:<16} | {name:<20} | {' | '.join(f'{cell:>9}' for cell in figures)} |"


class Row(NamedTuple):
    """The results of a variant: accuracies in % by seed."""

    variant: Variant
    top1: dict[int, float]

    def __str__(self) -> str:
        part, arch, name, _, published = self.variant
        values = self.top1.values()
        figures = [f"{of(values):.2f}" for of in (mean, min, max)] if values else ["-"] * 3
        return line(part, arch, name, str(len(values)), *figures, f"{published:.2f}" if published else "-")

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**self.variant._asdict(), "top1": self.top1, "mean": mean(self.top1.values()) if self.top1 else None}


HEADER = [
    line("part", "network", "variant", "seeds", "mean", "least", "most", "CIFAR-100"),
    "|---|---|---|---|---|---|---|---|",
]


def table(runs: Sequence[Run]) -> list[Row]:
    """Collects the accuracies of the finished trainings."""
    rows = {run.variant: Row(run.variant, {}) for run in runs}
    for run in runs:
        top1 = run.top1()
        if top1 is not None:
            rows[run.variant].top1[run.seed] = top1
    return list(rows.values())


def conversions(runs: Sequence[Run]) -> Iterator[dict[str, object]]:
    """Converts the first training of each network with all branches, and compares both forms on the test images."""
    full = {run.cfg.MODEL.ARCH: run for run in reversed(runs) if run.variant.name == "1x1 and 3x3" and run.top1()}
    for arch, run in full.items():
        deploy, figures = (run.folder / name for name in ("deploy.pth", "check.json"))
        size = run.cfg.DATA.IMG_SIZE
        call("convert.py", run.checkpoint, deploy)
        call("test.py", "shapes", "check", run.checkpoint, "-r", size, "-j", 0, "--json", figures)
        check = json.loads(figures.read_text())
        before, after = check["top1"], check["injected"]["top1"]
        print(
            f"{arch}, seed {run.seed}, in float32: {before:.2f} % before conversion, {after:.2f} % after, "
            f"largest relative logit difference {check['difference']:.1e}"
        )
        yield {"arch": arch, "seed": run.seed, **check}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the means as bars, every seed as a point, and the published accuracies of the same branches as crosses.

    Raises:
        ValueError: no training has finished.
    """
    from matplotlib.figure import Figure

    shown = {arch: [row for row in rows if row.top1 and row.variant.arch == arch] for arch in (REP, RES)}
    shown = {arch: of_arch for arch, of_arch in shown.items() if of_arch}
    if not shown:
        raise ValueError("--figure: there is nothing to draw, no training has finished")
    seen = {"marker": "o", "color": "#08519c", "markersize": 4, "label": "shapes, each seed"}
    paper = {"marker": "x", "color": "#d94801", "label": "CIFAR-100, published"}
    widths = [len(of_arch) for of_arch in shown.values()]
    figure = Figure(figsize=(2 + 0.9 * sum(widths), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axis, (arch, of_arch) in zip(axes, shown.items(), strict=True):
        names = [row.variant.name for row in of_arch]
        axis.bar(names, [mean(row.top1.values()) for row in of_arch], color="#9ecae1", label="shapes, mean")
        seeds = [(row.variant.name, top1) for row in of_arch for top1 in row.top1.values()]
        published = [(row.variant.name, row.variant.published) for row in of_arch if row.variant.published]
        for points, style in ((seeds, seen), (published, paper)):
            axis.plot([name for name, _ in points], [top1 for _, top1 in points], linestyle="", **style)
        axis.set_title(arch, fontsize=10)
        axis.tick_params(axis="x", labelsize=8, rotation=20)
    axes[0].set_ylabel("top-1 (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing and prints the table."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="rows to run, such as 'ResMLP*' or '* none'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds of each row")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="further keys for every training")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="parallel trainings, one thread each")
    parser.add_argument("--report", action="store_true", help="only report the finished trainings, train nothing")
    parser.add_argument("--output", type=Path, default=Path("output/ablation"), metavar="DIR", help="for the trainings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the figures to this file")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}: give at least 1")
    if args.figure and find_spec("matplotlib") is None:
        raise ValueError("--figure needs matplotlib: pip install 'matplotlib>=3.8' (the extra `plot`)")
    names = chosen((variant.title for variant in VARIANTS), args.only)
    variants = [variant for variant in VARIANTS if variant.title in names]
    runs = [run_of(variant, seed, args.output, args.opts) for seed in args.seeds for variant in variants]
    if not args.report:
        train_missing(runs, args.jobs)
    rows = table(runs)
    print("\n" + "\n".join([*HEADER, *map(str, rows)]) + "\n")
    checks = list(conversions(runs))
    if args.json:
        figures = {"rows": [row.as_dict() for row in rows], "conversions": checks}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    cli.run(main)
