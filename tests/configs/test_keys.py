"""Keys that do not exist, in a file and on the command line: the message names the source and the way out."""

import pytest

from configs import load_config, parse_opts

REFUSED = [
    ("TRAIN.EPOCH", "TRAIN: {EPOCH: 3}", "TRAIN.EPOCH", "unknown key; did you mean TRAIN.EPOCHS?"),
    ("train.epochs", "train.epochs: 3", "train.epochs", "unknown key; did you mean TRAIN.EPOCHS?"),
    ("TRIAN.EPOCHS", "TRIAN.EPOCHS: 3", "TRIAN.EPOCHS", "unknown key; did you mean TRAIN.EPOCHS?"),
    ("BATCH_SIZE", "BATCH_SIZE: 3", "BATCH_SIZE", "unknown key; did you mean DATA.BATCH_SIZE?"),
    ("XYZ", "XYZ: 3", "XYZ", "unknown key; configs/defaults.py lists all"),
    ("TRAIN", "TRAIN: 3", "TRAIN", "a section and not a key; set its keys, such as TRAIN.START_EPOCH"),
    ("TRAIN.OPTIMIZER", "TRAIN: {OPTIMIZER: null}", "TRAIN.OPTIMIZER", "a section and not a key"),
    ("TRAIN.EPOCHS.LAST", "TRAIN.EPOCHS.LAST: 3", "TRAIN.EPOCHS.LAST", "TRAIN.EPOCHS is a key and not a section"),
    ("AMP_OPT_LEVEL", "AMP_OPT_LEVEL: O1", "AMP_OPT_LEVEL", "no longer a key; use AMP: off for O0"),
    ("LOCAL_RANK", "LOCAL_RANK: 0", "LOCAL_RANK", "no longer a key; leave it out, the launcher"),
]


@pytest.mark.parametrize(("opts_key", "text", "key", "remedy"), REFUSED)
def test_unknown_keys(tmp_path, opts_key, text, key, remedy):
    path = tmp_path / "cfg.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="key") as from_opts:
        load_config(overrides=parse_opts([opts_key, "3"]))
    assert str(from_opts.value).startswith(f"{key} (--opts): {remedy}")
    with pytest.raises(ValueError, match="key") as from_file:
        load_config(path)
    assert str(from_file.value).startswith(f"{key} ({path}): {remedy}")


def test_keys_below_a_value_in_a_file(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("TRAIN: {EPOCHS: {LAST: 3}}")
    with pytest.raises(ValueError, match=r"TRAIN.EPOCHS = \{'LAST': '3'\} .*: expects an integer"):
        load_config(path)


def test_a_misspelt_section_in_a_file(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("TRIAN: {EPOCHS: 3}")
    with pytest.raises(ValueError, match=r"TRIAN .*: unknown key; did you mean TRAIN\?"):
        load_config(path)


def test_base_is_for_files_only():
    with pytest.raises(ValueError, match=r"BASE \(--opts\): only a YAML file can include others; .* --cfg"):
        load_config(overrides=parse_opts(["BASE", "other.yaml"]))


def test_a_key_may_be_dotted_in_a_file(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("TRAIN.OPTIMIZER: {NAME: sgd}\nTRAIN.EPOCHS: 20\n")
    cfg = load_config(path)
    assert (cfg.TRAIN.OPTIMIZER.NAME, cfg.TRAIN.EPOCHS) == ("sgd", 20)


def test_a_key_both_dotted_and_nested_is_refused(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("TRAIN: {EPOCHS: 20}\nTRAIN.EPOCHS: 30\n")
    with pytest.raises(ValueError, match=r"TRAIN.EPOCHS \(.*cfg.yaml\): is given twice"):
        load_config(path)


def test_an_evaluation_is_without_a_crop_as_published():
    assert load_config(None, parse_opts(["DATA.DATA_PATH", "digits"])).TEST.CROP is False
