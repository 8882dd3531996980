"""Configurations for tests, by the keys that differ from the defaults."""

from yacs.config import CfgNode

from configs import load_config, parse_opts


def settings(opts: str = "") -> CfgNode:
    """Returns a frozen configuration; `opts` are pairs as after `--opts`: `TRAIN.EPOCHS 2 AMP off`."""
    return load_config(None, parse_opts(opts.split()))
