"""Every spelling of a value that is understood, or refused: in YAML, on the command line, in Python."""

from pathlib import Path

import numpy as np
import pytest

from configs import Override, flatten, load_config

# key, what is written (the same in YAML and after --opts), what is meant
WRITTEN = [
    ("TRAIN.BASE_LR", "1", 1.0),
    ("TRAIN.BASE_LR", "0.01", 0.01),
    ("TRAIN.BASE_LR", "1e-3", 0.001),  # text to YAML 1.1
    ("TRAIN.BASE_LR", "5E-7", 5e-7),
    ("TRAIN.EPOCHS", "12", 12),
    ("TRAIN.EPOCHS", "012", 12),  # octal to YAML 1.1
    ("TRAIN.EPOCHS", "12.0", 12),
    ("TRAIN.EPOCHS", "1e2", 100),
    ("DATA.ZIP_MODE", "true", True),
    ("DATA.ZIP_MODE", "True", True),
    ("DATA.ZIP_MODE", "TRUE", True),
    ("DATA.PIN_MEMORY", "false", False),
    ("DATA.PIN_MEMORY", "False", False),
    ("COMPILE", "True", True),
    ("COMPILE", "false", False),
    ("COMPILE", "auto", "auto"),
    ("TAG", "plain", "plain"),
    ("TAG", "123", "123"),
    ("TAG", "0123", "0123"),  # 83 to YAML 1.1
    ("TAG", "1.10", "1.10"),
    ("TAG", "12:30", "12:30"),  # 750 to YAML 1.1
    ("TAG", "2024-05-06", "2024-05-06"),
    ("TAG", "yes", "yes"),
    ("AMP", "off", "off"),  # false to YAML 1.1
    ("DATA.CACHE_MODE", "no", "no"),
    ("AUG.AUTO_AUGMENT", "none", "none"),
    ("AUG.PRESET", "none", "none"),
    ("AUG.PRESET", "None", None),
    ("AUG.PRESET", "null", None),
    ("DATA.IMG_SIZE", "None", None),
    ("DATA.IMG_SIZE", "192", 192),
    ("DATA.IMG_SIZE", "[192, 224.0]", (192, 224)),
    ("MODEL.NUM_CLASSES", "7", 7),
    ("MODEL.BRANCHES", "[1, 3]", (1, 3)),
    ("MODEL.BRANCHES", "1,3", (1, 3)),
    ("MODEL.BRANCHES", "3", (3,)),
    ("MODEL.BRANCHES", "[]", ()),
    ("MODEL.CHANNELS", "[64, 128]", (64, 128)),
    ("TRAIN.LR_SCHEDULER.MILESTONES", "[22.2, 32]", (22.2, 32.0)),
    ("TRAIN.LR_SCHEDULER.MILESTONES", "30,60", (30.0, 60.0)),
    ("TRAIN.LR_SCHEDULER.MILESTONES", "0.5", (0.5,)),
    ("MODEL.BLOCKS", "2,2,6,2", (2, 2, 6, 2)),
    ("MODEL.GLOBAL_PERCEPTRON", "false", False),
    ("MODEL.GLOBAL_PERCEPTRON", "None", None),
    ("MODEL.MIXER", "conv3", "conv3"),
    ("MODEL.MIXER", "None", None),
    ("MODEL.INSERT_BN", "true", True),
    ("MODEL.INSERT_BN", "null", None),
    ("AUG.CUTMIX_MINMAX", "[0, 0.5]", (0.0, 0.5)),
    ("TRAIN.OPTIMIZER.BETAS", "[0.8, 0.99]", (0.8, 0.99)),
    ("TRAIN.OPTIMIZER.BETAS", "(0.8, 0.99)", (0.8, 0.99)),
    ("TRAIN.OPTIMIZER.BETAS", "0.8,0.99", (0.8, 0.99)),
]

# key, a Python value, what is meant
PYTHON = [
    ("TRAIN.BASE_LR", 1, 1.0),
    ("TRAIN.BASE_LR", np.float32(0.5), 0.5),
    ("TRAIN.BASE_LR", np.int64(2), 2.0),
    ("TRAIN.EPOCHS", 20.0, 20),
    ("TRAIN.EPOCHS", np.int32(20), 20),
    ("TRAIN.EPOCHS", np.float64(20), 20),
    ("DATA.ZIP_MODE", True, True),
    ("DATA.ZIP_MODE", np.True_, True),
    ("TAG", 7, "7"),
    ("TAG", np.str_("seven"), "seven"),
    ("MODEL.RESUME", Path("runs/latest.pth"), "runs/latest.pth"),
    ("DATA.IMG_SIZE", None, None),
    ("DATA.IMG_SIZE", [32, 64], (32, 64)),
    ("DATA.IMG_SIZE", (32, np.int64(64)), (32, 64)),
    ("TRAIN.OPTIMIZER.BETAS", [0, 0.5], (0.0, 0.5)),
]

# key, what is refused everywhere, what is said to be expected
REFUSED = [
    ("TRAIN.EPOCHS", "ten", "an integer"),
    ("TRAIN.EPOCHS", "10.5", "an integer"),
    ("TRAIN.EPOCHS", "true", "an integer"),
    ("TRAIN.EPOCHS", "nan", "an integer"),
    ("TRAIN.EPOCHS", "[10]", "an integer"),
    ("TRAIN.EPOCHS", "null", "an integer"),
    ("TRAIN.EPOCHS", "''", "an integer"),
    ("TRAIN.BASE_LR", "fast", "a finite number"),
    ("TRAIN.BASE_LR", "nan", "a finite number"),
    ("TRAIN.BASE_LR", ".inf", "a finite number"),
    ("TRAIN.BASE_LR", "1e999", "a finite number"),
    ("TRAIN.BASE_LR", "True", "a finite number"),
    ("TRAIN.BASE_LR", "null", "a finite number"),
    ("DATA.ZIP_MODE", "1", "true or false"),
    ("DATA.ZIP_MODE", "yes", "true or false"),
    ("DATA.ZIP_MODE", "null", "true or false"),
    ("TAG", "null", "text"),
    ("MODEL.RESUME", "None", "text"),
    ("TRAIN.OPTIMIZER.BETAS", "0.9", "a pair of finite numbers"),
    ("TRAIN.OPTIMIZER.BETAS", "[0.9, 0.99, 0.999]", "a pair of finite numbers"),
    ("TRAIN.OPTIMIZER.BETAS", "[0.9, high]", "a pair of finite numbers"),
    ("TRAIN.OPTIMIZER.BETAS", "null", "a pair of finite numbers"),
    ("TRAIN.LR_SCHEDULER.MILESTONES", "[30, late]", "finite numbers such as"),
    ("TRAIN.LR_SCHEDULER.MILESTONES", "null", "finite numbers such as"),
    ("DATA.IMG_SIZE", "large", "an integer, or a pair of integers"),
    ("DATA.IMG_SIZE", "[224]", "an integer, or a pair of integers"),
    ("DATA.IMG_SIZE", "[224, 224.5]", "an integer, or a pair of integers"),
    ("MODEL.NUM_CLASSES", "many", "an integer, or null"),
]

REFUSED_PYTHON = [
    ("TRAIN.EPOCHS", True),
    ("TRAIN.EPOCHS", np.True_),
    ("TRAIN.EPOCHS", None),
    ("TRAIN.BASE_LR", False),
    ("TRAIN.BASE_LR", float("nan")),
    ("TRAIN.BASE_LR", np.float32("inf")),
    ("TRAIN.BASE_LR", 10**400),
    ("DATA.ZIP_MODE", 1),
    ("TAG", True),
    ("TAG", ["a"]),
    ("TRAIN.OPTIMIZER.BETAS", (True, 0.9)),
]


def same(value, expected):
    return type(value) is type(expected) and value == expected


def yaml_file(folder: Path, key: str, text: str) -> Path:
    path = folder / "cfg.yaml"
    *sections, name = key.split(".")
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    path.write_text("\n".join([*lines, f"{'  ' * len(sections)}{name}: {text}"]) + "\n")
    return path


@pytest.mark.parametrize(("key", "text", "meant"), WRITTEN)
def test_text_means_the_same_in_a_file_and_on_the_command_line(tmp_path, key, text, meant):
    from_opts = load_config(overrides=[Override("--opts", key, text)])
    assert same(flatten(from_opts)[key], meant)
    from_file = load_config(yaml_file(tmp_path, key, text))
    assert same(flatten(from_file)[key], meant)


@pytest.mark.parametrize(("key", "value", "meant"), PYTHON)
def test_python_values(key, value, meant):
    assert same(flatten(load_config(overrides=[Override("flag", key, value)]))[key], meant)


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL"])
def test_every_null_of_yaml(tmp_path, text):
    assert load_config(yaml_file(tmp_path, "AUG.PRESET", text)).AUG.PRESET is None


def test_empty_text_is_text():
    assert load_config(overrides=[Override("--resume", "MODEL.RESUME", "")]).MODEL.RESUME == ""


@pytest.mark.parametrize(("key", "text", "expected"), REFUSED)
def test_refused_in_a_file_and_on_the_command_line(tmp_path, key, text, expected):
    for source, load in {
        "--opts": lambda: load_config(overrides=[Override("--opts", key, text)]),
        "cfg.yaml": lambda: load_config(yaml_file(tmp_path, key, text)),
    }.items():
        with pytest.raises(ValueError, match="expects") as caught:
            load()
        message = str(caught.value)
        assert message.startswith(f"{key} = ")
        assert f"{source})" in message
        assert f"expects {expected}" in message
        assert "\n" not in message


@pytest.mark.parametrize(("key", "value"), REFUSED_PYTHON)
def test_refused_python_values(key, value):
    with pytest.raises(ValueError, match=rf"{key} = .* \(--flag\): expects"):
        load_config(overrides=[Override("--flag", key, value)])


def test_null_for_a_key_that_cannot_have_it_tells_the_remedy():
    with pytest.raises(ValueError, match="leave the key out for its default"):
        load_config(overrides=[Override("--opts", "TAG", "None")])
