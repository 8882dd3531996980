"""Settings that have changed since a checkpoint was written."""

from itertools import pairwise

import pytest

from configs import changed_settings, load_config, parse_opts

ANY = "DATA.DATA_PATH digits"


def config(opts: str = ""):
    return load_config(None, parse_opts(f"{ANY} {opts}".split()))


def test_equal_settings_have_not_changed():
    cfg = config("DATA.IMG_SIZE 16,24 MODEL.BRANCHES [1,3] AMP off TRAIN.OPTIMIZER.BETAS 0.8,0.9 AUG.PRESET none")
    assert changed_settings(cfg.dump(), cfg) == []
    assert changed_settings(cfg.dump(sort_keys=False), cfg) == []


def test_each_change_is_named_with_both_values():
    before = config("TRAIN.BASE_LR 0.004 MODEL.DROP_PATH 0.1")
    after = config("TRAIN.BASE_LR 0.001 DATA.IMG_SIZE 16")
    assert changed_settings(before.dump(), after) == [
        "DATA.IMG_SIZE None -> 16",
        "MODEL.DROP_PATH 0.1 -> 0.0",
        "TRAIN.BASE_LR 0.004 -> 0.001",
    ]


def test_where_a_run_is_and_how_it_was_started_is_no_change():
    assert changed_settings(config().dump(), config("OUTPUT x TAG y MODEL.RESUME z.pth")) == []


def test_keys_that_the_text_lacks_count_with_their_defaults_and_unknown_ones_do_not_count():
    text = "TRAIN: {BASE_LR: 0.5, OLD_KEY: 3}\nDATA: {DATA_PATH: digits}\n"
    assert changed_settings(text, config()) == ["TRAIN.BASE_LR 0.5 -> 0.002"]


@pytest.mark.parametrize(
    "text",
    ["TRAIN: [", "TRAIN: {BASE_LR: high}", "a: &a [*a]", "!!python/object:os.system {}", "\0", "TAG: " + "x" * 2**21],
    ids=range(6),
)
def test_a_text_that_is_no_configuration(text):
    with pytest.raises(ValueError, match="the configuration in the checkpoint") as error:
        changed_settings(text, config())
    assert len(str(error.value)) < 300


def test_a_text_of_aliases_that_stand_for_billions_of_values():
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = [f"{b}: &{b} {{p: *{a}, q: *{a}}}" for a, b in pairwise(letters)]
    with pytest.raises(ValueError, match="more than 10000 values"):
        changed_settings("\n".join(["a: &a {x: 1}", *lines]), config())
