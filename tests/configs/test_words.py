"""Names of other projects, as flags and as keys: the error names the key or flag of ours, or says why there is none."""

import re

import pytest

from configs import command_line, load_config, parse_opts
from configs.schema import FIELD_TYPES, SECTIONS
from configs.words import _WORDS, WORDS, meant_by

FLAGS = {key: flag for flag, (key, _) in command_line.FLAGS.items()}
COMMON = """
lr learning-rate epochs wd weight-decay workers num-workers seed optimizer opt device wandb momentum warmup drop-path
img-size input-size resolution model task decoder margin num-pairs checkpoint model-ema mixup cutmix smoothing
clip-grad sched log-interval data-dir finetune dist-url world-size gpu nproc nproc-per-node loss num-classes
color-jitter
""".split()  # noqa: SIM905


def refused_flag(flag: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        command_line.parse([flag, "3"])
    assert stop.value.code == 2
    return capsys.readouterr().err


def refused_key(key: str) -> str:
    with pytest.raises(ValueError, match=r"\(--opts\): unknown key") as caught:
        load_config(overrides=parse_opts([key, "3"]))
    return str(caught.value)


def test_a_word_has_one_meaning_and_none_is_a_flag_or_a_key():
    assert len(WORDS) == sum(len(words.split()) for words in _WORDS.values())
    assert all(re.fullmatch(r"[a-z0-9_.]+", word) for word in WORDS)
    assert {f"--{word.replace('_', '-')}" for word in WORDS}.isdisjoint(command_line.FLAGS)


@pytest.mark.parametrize("meant", _WORDS)
def test_a_meaning_is_a_key_or_advice_that_names_keys_which_exist(meant):
    assert meant in FIELD_TYPES or " " in meant
    assert set(re.findall(r"\b(?:[A-Z_]+\.)+[A-Z_]+\b", meant)) <= set(FIELD_TYPES)


@pytest.mark.parametrize("word", WORDS)
def test_every_word_is_understood_as_a_flag_and_as_a_key(word, capsys):
    meant = WORDS[word]
    error = refused_flag(f"--{word.replace('_', '-')}", capsys)
    if meant in FIELD_TYPES:
        assert f": use {FLAGS.get(meant) or f'--opts {meant} VALUE'} (--help lists all)" in error
    else:
        assert f": {meant} (--help lists all)" in error
    for key in {word.upper(), word.upper() if "." in word else f"TRAIN.{word.upper()}"} - {*FIELD_TYPES, *SECTIONS}:
        error = refused_key(key)
        assert f"did you mean {meant}?" in error if meant in FIELD_TYPES else meant in error


@pytest.mark.parametrize("word", COMMON)
def test_the_common_words_are_among_them(word):
    assert meant_by(f"--{word}")


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--lr", "unknown argument --lr: use --opts TRAIN.BASE_LR VALUE (--help lists all)"),
        ("--model", "unknown argument --model: use --arch (--help lists all)"),
        ("--device", "CUDA_VISIBLE_DEVICES"),
        ("--wandb", "metrics.jsonl"),
        ("--world_size", "torchrun --nproc_per_node"),
        ("--data", "did you mean --data-path?"),
        ("--batchsize", "did you mean --batch-size?"),
        ("--quux", "--opts KEY VALUE sets any key of configs/defaults.py"),
    ],
)
def test_flags(flag, remedy, capsys):
    error = refused_flag(flag, capsys)
    assert remedy in error
    assert error.count("\n") == 1


def test_help_tells_the_default_of_each_flag(capsys):
    with pytest.raises(SystemExit):
        command_line.parse(["--help"], epilog="architectures: a, b")
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default: ") == len(command_line.FLAGS)
    assert "images per process and step (default: 128)" in text
    assert "read train.zip and val.zip instead of folders (default: off)" in text
    assert "start a new training from these weights (default: none)" in text
    assert text.endswith("architectures: a, b")
