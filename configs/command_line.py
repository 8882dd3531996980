"""The command line of a run: flags that set keys, recipes, and any key by `--opts`."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from yacs.config import CfgNode

from data.datasets import WITHOUT_PATH
from utils import cli

from .constraints import CONSTRAINTS
from .load import Override, load, parse_opts
from .schema import DEFAULTS, FIELD_TYPES
from .words import meant_by

# Each flag, the key that it sets, and its arguments for argparse.
FLAGS: dict[str, tuple[str, dict]] = {
    "--arch": ("MODEL.ARCH", {"metavar": "NAME", "help": "RepMLPNet-T224 ..., or any architecture of timm"}),
    "--batch-size": ("DATA.BATCH_SIZE", {"type": int, "metavar": "N", "help": "images per process and step"}),
    "--data-path": (
        "DATA.DATA_PATH",
        {"metavar": "DIR", "help": f"folder of the data set, or {' or '.join(WITHOUT_PATH)}"},
    ),
    "--dataset": ("DATA.DATASET", {"metavar": "NAME", "help": ", ".join(CONSTRAINTS["DATA.DATASET"].choices)}),
    "--zip": ("DATA.ZIP_MODE", {"action": "store_true", "help": "read train.zip and val.zip instead of folders"}),
    "--cache-mode": (
        "DATA.CACHE_MODE",
        {"choices": CONSTRAINTS["DATA.CACHE_MODE"].choices, "help": "how much of the zips to cache in memory"},
    ),
    "--resume": ("MODEL.RESUME", {"metavar": "FILE", "help": "resume from this checkpoint; with --eval, evaluate it"}),
    "--pretrained": ("MODEL.PRETRAINED", {"metavar": "FILE", "help": "start a new training from these weights"}),
    "--accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", {"type": int, "metavar": "N", "help": "batches per update"}),
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        {"action": "store_true", "help": "recompute activations, save memory"},
    ),
    "--amp": ("AMP", {"choices": CONSTRAINTS["AMP"].choices, "help": "precision of the forward pass"}),
    "--compile": ("COMPILE", {"action": "store_true", "help": "compile the network with torch.compile"}),
    "--output": ("OUTPUT", {"metavar": "DIR", "help": "a run writes to DIR/<arch>/<tag>/"}),
    "--tag": ("TAG", {"metavar": "NAME", "help": "name of the run"}),
    "--eval": ("EVAL_MODE", {"action": "store_true", "help": "evaluate instead of training"}),
    "--throughput": (
        "THROUGHPUT_MODE",
        {"action": "store_true", "help": "measure images per second instead of training"},
    ),
    "--summary": (
        "SUMMARY_MODE",
        {"action": "store_true", "help": "print parameters and multiply-adds, by part, instead of training"},
    ),
    "--profile": (
        "PROFILE_MODE",
        {"action": "store_true", "help": "write a trace of a few updates instead of training to the end"},
    ),
}
APEX_LEVELS = {"O0": "off", "O1": "fp16", "O2": "fp16"}


class Options(NamedTuple):
    """The parsed command line: the configuration, the keys that were given, the launcher's argument, and notices."""

    config: CfgNode
    given: frozenset[str]
    local_rank: int | None
    notices: list[str]


def parse(argv: Sequence[str] | None = None, description: str | None = None, epilog: str | None = None) -> Options:
    """Reads the command line and the files that it names into a frozen configuration.

    Args:
        argv: the arguments; None: those of this process.
        description: the first lines of `--help`.
        epilog: the last lines of `--help`.

    Raises:
        ValueError: an unknown key, a wrong value, or one key given two values.
        SystemExit: an unknown flag, or `--help`.
    """
    parser = cli.Parser(description=description, epilog=epilog, argument_default=None, hint=_hint)
    parser.add_argument("--cfg", metavar="FILE", help="recipe, a YAML file")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="any keys of the configuration")
    for flag, (key, options) in FLAGS.items():
        parser.add_argument(flag, default=None, **options | {"help": f"{options['help']} ({_default(key)})"})
    parser.add_argument("--amp-opt-level", choices=list(APEX_LEVELS), help="the old name of --amp")
    parser.add_argument("--local-rank", "--local_rank", type=int, help="set by old launchers; the environment wins")
    args, notices = parser.parse_args(argv), []
    given = {flag: getattr(args, flag[2:].replace("-", "_")) for flag in FLAGS}
    overrides = [Override(flag, FLAGS[flag][0], value) for flag, value in given.items() if value is not None]
    if args.amp_opt_level:
        amp = APEX_LEVELS[args.amp_opt_level]
        notices.append(f"--amp-opt-level {args.amp_opt_level} is the old name of --amp {amp}")
        overrides.append(Override("--amp-opt-level", "AMP", amp))
    return Options(*load(args.cfg, [*overrides, *parse_opts(args.opts)]), args.local_rank, notices)


def _default(key: str) -> str:
    """Describes the default of a key."""
    default = DEFAULTS[key]
    return f"default: {'off' if default is False else default}" if default not in (None, "") else "default: none"


def _hint(word: str, known: Iterable[str]) -> str:
    """Suggests what to give in place of an unknown flag."""
    meant = meant_by(word)
    flags = {key: flag for flag, (key, _) in FLAGS.items()}
    if meant in FIELD_TYPES:
        return f": use {flags.get(meant) or f'--opts {meant} VALUE'}"
    if meant:
        return f": {meant}"
    return cli.did_you_mean(word, known) or "; --opts KEY VALUE sets any key of configs/defaults.py"
