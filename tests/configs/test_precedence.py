"""Who wins where a key is given at several levels, and what happens where two of one level disagree."""

from itertools import combinations
from pathlib import Path

import pytest

from configs import Override, flatten, load_config, parse_opts

LEVELS = ["default", "nested BASE", "first BASE", "second BASE", "cfg", "override"]
FILES = {"nested BASE": "nested.yaml", "first BASE": "first.yaml", "second BASE": "second.yaml", "cfg": "cfg.yaml"}
BASES = {"first BASE": "BASE: [nested.yaml]\n", "cfg": "BASE: [sub/first.yaml, sub/second.yaml]\n"}
ALL_PAIRS = [pytest.param(*pair, id=" < ".join(pair)) for pair in combinations(LEVELS, 2)]
VALUE = {level: 100 + index for index, level in enumerate(LEVELS)}  # the default of TRAIN.EPOCHS is 100


def epochs_with(folder: Path, levels: set[str], source: str = "--opts"):
    """Loads a tree of four files in two folders with TRAIN.EPOCHS given at some levels only, and returns it."""
    (folder / "sub").mkdir()
    for level, name in FILES.items():
        path = folder / name if level == "cfg" else folder / "sub" / name
        text = f"TRAIN: {{EPOCHS: {VALUE[level]}}}\n" if level in levels else "TAG: other\n"
        path.write_text(BASES.get(level, "") + text)
    overrides = [Override(source, "TRAIN.EPOCHS", VALUE["override"])] if "override" in levels else []
    return flatten(load_config(folder / "cfg.yaml", overrides))["TRAIN.EPOCHS"]


@pytest.mark.parametrize(("lower", "upper"), ALL_PAIRS)
def test_the_upper_level_wins(tmp_path, lower, upper):
    assert epochs_with(tmp_path, {lower, upper}) == VALUE[upper]


@pytest.mark.parametrize("level", LEVELS)
def test_the_levels_above_do_not_reset_what_they_leave_out(tmp_path, level):
    assert epochs_with(tmp_path, {level}) == VALUE[level]


@pytest.mark.parametrize("source", ["--epochs", "--opts"])
def test_flags_and_opts_win_alike_over_a_file(tmp_path, source):
    assert epochs_with(tmp_path, set(LEVELS), source) == VALUE["override"]


def test_opts_are_read_in_pairs():
    expected = [Override("--opts", "TAG", "a"), Override("--opts", "TRAIN.EPOCHS", "3")]
    assert parse_opts(["TAG", "a", "TRAIN.EPOCHS", "3"]) == expected


def test_opts_without_a_last_value_show_what_is_left_over():
    with pytest.raises(ValueError, match=r"--opts: 'TRAIN.EPOCHS' is left over; expects pairs KEY VALUE"):
        parse_opts(["TAG", "a", "TRAIN.EPOCHS"])


def test_a_flag_and_opts_that_disagree_are_refused():
    overrides = [Override("--batch-size", "DATA.BATCH_SIZE", 32), Override("--opts", "DATA.BATCH_SIZE", "64")]
    with pytest.raises(ValueError, match=r"DATA.BATCH_SIZE .* 32 \(--batch-size\) and 64 \(--opts\); keep one"):
        load_config(overrides=overrides)


def test_opts_that_disagree_with_themselves_are_refused():
    with pytest.raises(ValueError, match=r"TAG .* 'a' \(--opts\) and 'b' \(--opts\)"):
        load_config(overrides=parse_opts(["TAG", "a", "TAG", "b"]))


@pytest.mark.parametrize(("flag", "opts"), [(32, "32"), (32, "32.0"), ("32", "32")])
def test_the_same_value_twice_is_fine(flag, opts):
    overrides = [Override("--batch-size", "DATA.BATCH_SIZE", flag), Override("--opts", "DATA.BATCH_SIZE", opts)]
    assert load_config(overrides=overrides).DATA.BATCH_SIZE == 32


def test_a_configuration_is_frozen_on_every_level():
    cfg = load_config()
    with pytest.raises(AttributeError):
        cfg.TAG = "other"
    with pytest.raises(AttributeError):
        cfg.TRAIN.OPTIMIZER.NAME = "sgd"


def test_two_configurations_share_nothing():
    load_config().BASE.append("changed")
    assert load_config().BASE == [""]
