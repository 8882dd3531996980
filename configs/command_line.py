"""The command line of a run: flags that set keys, recipes, and any key by `--opts`."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from yacs.config import CfgNode

from utils import cli

from .load import Override, load, parse_opts
from .schema import DEFAULTS, KINDS
from .words import meant_by

# Each flag and the configuration key that it sets.
FLAGS: dict[str, tuple[str, dict]] = {
    "--arch": ("MODEL.ARCH", {"metavar": "NAME", "help": "RepMLPNet-T224 ..., or any architecture of timm"}),
    "--batch-size": ("DATA.BATCH_SIZE", {"type": int, "metavar": "N", "help": "images per process and step"}),
    "--data-path": ("DATA.DATA_PATH", {"metavar": "DIR", "help": "folder with train/ and val/, or digits, or shapes"}),
    "--dataset": ("DATA.DATASET", {"metavar": "NAME", "help": "imagenet (any image folder), cf100, digits or shapes"}),
    "--zip": ("DATA.ZIP_MODE", {"action": "store_true", "help": "read train.zip and val.zip instead of folders"}),
    "--cache-mode": (
        "DATA.CACHE_MODE",
        {"choices": ["no", "part", "full"], "help": "what of the zips to keep in memory"},
    ),
    "--resume": ("MODEL.RESUME", {"metavar": "FILE", "help": "resume from this checkpoint; with --eval, evaluate it"}),
    "--pretrained": ("MODEL.PRETRAINED", {"metavar": "FILE", "help": "start a new training from these weights"}),
    "--accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", {"type": int, "metavar": "N", "help": "batches per update"}),
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        {"action": "store_true", "help": "recompute activations, save memory"},
    ),
    "--amp": ("AMP", {"choices": ["auto", "off", "bf16", "fp16"], "help": "precision of the forward pass"}),
    "--compile": ("COMPILE", {"action": "store_true", "help": "compile the network"}),
    "--output": ("OUTPUT", {"metavar": "DIR", "help": "a run writes to DIR/<arch>/<tag>/"}),
    "--tag": ("TAG", {"metavar": "NAME", "help": "name of the run"}),
    "--eval": ("EVAL_MODE", {"action": "store_true", "help": "only evaluate"}),
    "--throughput": ("THROUGHPUT_MODE", {"action": "store_true", "help": "only measure speed"}),
}
APEX_LEVELS = {"O0": "off", "O1": "fp16", "O2": "fp16"}


class Options(NamedTuple):
    """What the command line says: the configuration, which keys of it were given, the launcher's argument, notices."""

    config: CfgNode
    given: frozenset[str]
    local_rank: int | None
    notices: list[str]


def parse(argv: Sequence[str] | None = None, description: str | None = None, epilog: str | None = None) -> Options:
    """Reads the command line and the files that it names into a frozen configuration.

    Args:
        argv: the words; those of this process where None.
        description: what `--help` begins with.
        epilog: what it ends with.

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
    """Tells the default that the schema has for a key."""
    default = DEFAULTS[key]
    return f"default: {'off' if default is False else default}" if default not in (None, "") else "default: none"


def _hint(word: str, known: Iterable[str]) -> str:
    """Tells what to give in place of an unknown flag."""
    meant = meant_by(word)
    flags = {key: flag for flag, (key, _) in FLAGS.items()}
    if meant in KINDS:
        return f": use {flags.get(meant) or f'--opts {meant} VALUE'}"
    if meant:
        return f": {meant}"
    return cli.did_you_mean(word, known) or "; --opts KEY VALUE sets any key of configs/defaults.py"
