"""YAML files: what is refused as a file, the chain of BASE, and writing a configuration that reads back equal."""

import json
import os
import random
import socket
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import Override, defaults, flatten, load_config
from configs.constraints import CONFLICTS, CONSTRAINTS, TRAINING_CONFLICTS, unused_keys
from configs.field_types import (
    BOOLEAN,
    INTEGER,
    INTEGERS,
    NULL_WORDS,
    NUMBER,
    NUMBER_PAIR,
    NUMBERS,
    PATH,
    SIZE,
    SWITCH,
    TEXT,
)
from configs.schema import DEFAULTS, FIELD_TYPES
from tasks import TASKS

CONFIGS = Path(__file__).parents[2] / "configs"

BROKEN = [
    ("TAG: a\nTAG: b\n", r"line 2: TAG is given twice"),
    ("TRAIN:\n  EPOCHS: 3\n  EPOCHS: 3\n", r"line 3: EPOCHS is given twice"),
    ("TAG: !!python/object/apply:os.getcwd []\n", r"line 1: could not determine a constructor for the tag"),
    ("TRAIN: !!python/tuple [1, 2]\n", r"line 1: could not determine a constructor for the tag"),
    ("TAG: [a\n", r"line 2: .*, expected ',' or ']'"),
    ("TAG: *unknown\n", r"line 1: found undefined alias"),
    ("[a, b]: c\n", r"line 1: .*, found unhashable key"),
    ("- TAG\n- a\n", r"is not a mapping; write KEY: VALUE lines"),
    ("TAG\n", r"is not a mapping"),
    ("", r"is empty"),
    ("# only a comment\n", r"is empty"),
    ("TAG: a\n---\nTAG: b\n", r"expected a single document"),
    ("TAG: \x00\n", r"cannot be read as YAML"),
    ("[" * 5000, r"cannot be read as YAML"),
    ("TRAIN: !!int ten\n", r"line 1: could not determine a constructor for the tag"),
    *(
        (f"TAG: !!{tag} {value}\n", r"line 1: could not determine a constructor for the tag")
        for tag in ("int", "float", "bool", "binary", "timestamp", "set", "omap", "pairs", "object", "python/name:os")
        for value in ("''", "x", "[a]", "{a: b}")
    ),
    ("TAG: !own x\n", r"line 1: could not determine a constructor for the tag"),
    ("? [a]\n: b\n", r"line 1: .*, found unhashable key"),
    ("? {a: b}\n: c\n", r"line 1: .*, found unhashable key"),
    ("TRAIN: {<<: 3}\n", r"line 1: .*, expected a mapping or list of mappings"),
    ("TRAIN: {<<: [3]}\n", r"line 1: .*, expected a mapping"),
    ("TRAIN: {<<: }\n", r"line 1: .*, expected a mapping"),
    ("TAG: a\n\tb: c\n", r"line 2: .*"),
    ("TRAIN:\n\tEPOCHS: 3\n", r"line 2: .*found character '.t' that cannot start any token"),
    ('TAG: "\\UFFFFFFFF"\n', r"cannot be read as YAML"),
    ('TAG: "\\U00110000"\n', r"cannot be read as YAML"),
    ("TAG: \x1b[2J\n", r"cannot be read as YAML"),
    ("%YAML 3.0\n---\nTAG: a\n", r"line 1: .*"),
    ("{a: " * 3000 + "b" + "}" * 3000, r"cannot be read as YAML"),
    ("- " * 3000, r"cannot be read as YAML"),
    ("TAG: &a [*a]\n", r"line 1: contains itself"),
    ("TRAIN: &a {OPTIMIZER: *a}\n", r"line 1: contains itself"),
    ("TAG: [" + "a," * 20_000 + "]", r"line 1: contains more than 10000 values"),
    ("TAG: a\n#" + "x" * 2**20, r"is larger than 1048576 bytes"),
    ("BASE: {a: b}\nTAG: a\n", r"BASE = .*: expects a list of YAML files"),
    ("BASE:\nTAG: a\n", r"BASE = None .*: expects a list of YAML files"),
    ("BASE: [[a.yaml]]\n", r"BASE = .*: expects a list of YAML files"),
]


@pytest.mark.parametrize(("text", "complaint"), BROKEN)
def test_broken_files_end_in_one_line_that_names_the_file(tmp_path, text, complaint):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"weights.pth.*YAML|weights.pth, line"):
        load_config(path)


@pytest.mark.parametrize("value", ["[*{0}, *{0}]", "{{x: *{0}, y: *{0}}}", "{{<<: [*{0}, *{0}], x{0}: y}}"])
def test_aliases_of_aliases(tmp_path, value):
    names = "abcdefghijklmnopqrstuvwxyz"
    lines = [f"{below}: &{below} {value.format(name)}" for name, below in pairwise(names)]
    (tmp_path / "cfg.yaml").write_text("\n".join(["a: &a {k: v}", *lines]))
    with pytest.raises(ValueError, match=r"cfg.yaml, line \d+: contains more than 10000 values"):
        load_config(tmp_path / "cfg.yaml")


def test_files_that_include_the_next_one_twice(tmp_path):
    for index in range(20):
        (tmp_path / f"{index}.yaml").write_text(f"BASE: [{index + 1}.yaml, {index + 1}.yaml]")
    (tmp_path / "20.yaml").write_text("TAG: last")
    assert load_config(tmp_path / "0.yaml").TAG == "last"
    (tmp_path / "20.yaml").write_text("BASE: 21.yaml")
    (tmp_path / "21.yaml").write_text("TAG: last")
    with pytest.raises(ValueError, match=r"21.yaml: BASE is nested 21 files deep; 20 are allowed"):
        load_config(tmp_path / "0.yaml")


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/null", "socket"])
def test_what_is_no_regular_file_is_not_read(tmp_path, kind):
    path = tmp_path / "cfg.yaml" if not kind.startswith("/") else Path(kind)
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    (tmp_path / "including.yaml").write_text(f"BASE: {path}")
    with pytest.raises(ValueError, match=rf"{path} \(--cfg\): is not a regular file"):
        load_config(path)
    with pytest.raises(ValueError, match=rf"{path} \(BASE of .*including.yaml\): is not a regular file"):
        load_config(tmp_path / "including.yaml")


@pytest.mark.parametrize("path", ["~nosuchuser/cfg.yaml", "loop.yaml", "a\0b.yaml", "x" * 300])
def test_paths_that_lead_nowhere(tmp_path, path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "cfg.yaml").write_text(f"BASE: {json.dumps(path)}")
    for cfg in (tmp_path / "cfg.yaml", path if path.startswith("~") else tmp_path / path):
        with pytest.raises((ValueError, FileNotFoundError), match=r"no such (user|file)|File name too long|NUL"):
            load_config(cfg)


def test_recipes_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("TAG: home")
    (tmp_path / "cfg.yaml").write_text("BASE: ~/base.yaml")
    assert load_config("~/cfg.yaml").TAG == "home"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig", "latin-1"])
def test_other_encodings(tmp_path, encoding):
    (tmp_path / "cfg.yaml").write_bytes("TAG: \u00c4rger\n".encode(encoding))
    if encoding in ("utf-16", "utf-8-sig"):
        assert load_config(tmp_path / "cfg.yaml").TAG == "\u00c4rger"
    else:
        with pytest.raises(ValueError, match=r"cfg.yaml: cannot be read as YAML"):
            load_config(tmp_path / "cfg.yaml")


TOKENS = [
    *"[]{}:,-?&*!|>%@`'\"#~=\n\t \\\0\r\x85\u2028\ufeff\x1b\x7f\xff",
    *("<<: ", "*a", "&a ", "!!set ", "!!int ", "!!binary ", "!<", "\n---\n", "\n...\n", "%TAG ", "? ", "- - "),
    *("BASE: ", "TRAIN: ", "null", '"\\x', "9" * 5000, "-1e999", "../"),
]


def mutated(text: str, rng: random.Random) -> bytes:
    """Cuts, repeats, and inserts parts of a recipe at random places, and flips some bytes."""
    for _ in range(rng.randint(1, 6)):
        at, to = sorted(rng.randint(0, len(text)) for _ in range(2))
        part = rng.choice((rng.choice(TOKENS), rng.choice(TOKENS) * rng.randint(1, 2000), text[at:to] * 2, ""))
        text = text[:at] + part + text[rng.choice((at, to)) :]
    content = bytearray(text.encode(rng.choice(("utf-8", "utf-8", "utf-16", "utf-32")), "replace"))
    for _ in range(rng.choice((0, 0, 3)) if content else 0):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


@pytest.mark.parametrize("seed", range(4))
def test_no_file_gives_anything_but_one_line(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "cfg.yaml"
    recipes = [recipe.read_text() for recipe in sorted(CONFIGS.glob("*.yaml"))] + ["TRAIN: &a {EPOCHS: 30}\nAUG: *a\n"]
    refused = []
    for _ in range(250):
        path.write_bytes(mutated(rng.choice(recipes), rng))
        try:
            load_config(path)
        except (ValueError, OSError) as error:
            refused.append(str(error))
    assert 20 < len(refused) < 250
    assert [text for text in refused if str(path) not in text and "no such user" not in text] == []
    assert max(map(len, refused)) < 10_000


def test_a_missing_file_names_the_closest_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("TAG: a")
    with pytest.raises(FileNotFoundError, match=r"recipes.yaml \(--cfg\): no such file; did you mean recipe.yaml\?"):
        load_config(tmp_path / "recipes.yaml")


def test_a_missing_base_names_who_wants_it(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("BASE: [none.yaml]")
    with pytest.raises(FileNotFoundError, match=rf"none.yaml \(BASE of {path}\): no such file"):
        load_config(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"\(--cfg\): is a folder; give a YAML file"):
        load_config(tmp_path)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_base_in_a_circle(tmp_path, length):
    for index in range(length):
        (tmp_path / f"{index}.yaml").write_text(f"BASE: [{(index + 1) % length}.yaml]")
    with pytest.raises(ValueError, match=r"BASE is circular: .*0\.yaml -> .*0\.yaml"):
        load_config(tmp_path / "0.yaml")


def test_two_files_may_share_a_base(tmp_path):
    (tmp_path / "shared.yaml").write_text("TAG: shared")
    for name in ("left", "right"):
        (tmp_path / f"{name}.yaml").write_text("BASE: [shared.yaml]")
    (tmp_path / "cfg.yaml").write_text("BASE: [left.yaml, right.yaml]")
    assert load_config(tmp_path / "cfg.yaml").TAG == "shared"


@pytest.mark.parametrize("base", ["base.yaml", "[base.yaml]", "['', base.yaml]"])
def test_spellings_of_base(tmp_path, base):
    (tmp_path / "base.yaml").write_text("TAG: base")
    (tmp_path / "cfg.yaml").write_text(f"BASE: {base}")
    cfg = load_config(str(tmp_path / "cfg.yaml"))
    assert cfg.TAG == "base"
    assert cfg.BASE == [""]


def test_anchors_and_merge_keys(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text("TAG: &name a\nMODEL: {ARCH: *name}\nTRAIN.OPTIMIZER: {<<: {NAME: sgd, EPS: 1e-3}, NAME: adamw}\n")
    flat = flatten(load_config(path))
    assert flat["MODEL.ARCH"] == "a"
    assert flat["TRAIN.OPTIMIZER.EPS"] == 0.001
    assert flat["TRAIN.OPTIMIZER.NAME"] == "adamw"  # the mapping's own key wins over the merged one


def test_no_file_and_no_override_is_the_schema():
    assert load_config() == defaults()


def test_the_defaults_are_copies():
    changed = defaults()
    changed.TRAIN.EPOCHS = 1
    assert defaults().TRAIN.EPOCHS == 100


def test_flatten_is_in_the_order_of_the_schema():
    flat = flatten(load_config())
    assert list(flat) == list(DEFAULTS)
    assert flat["TRAIN.OPTIMIZER.BETAS"] == (0.9, 0.999)


_TEXT = st.text().filter(lambda text: text.strip() and text not in NULL_WORDS)
_BY_TYPE = {
    BOOLEAN.name: st.booleans(),
    SWITCH.name: st.booleans() | st.just("auto"),
    INTEGER.name: st.integers(1, 1000),
    NUMBER.name: st.floats(1e-30, 1, exclude_max=True),
    TEXT.name: _TEXT,
    PATH.name: _TEXT.filter(lambda text: not text.startswith("~")),
    NUMBER_PAIR.name: st.tuples(st.floats(0, 0.4), st.floats(0.5, 0.9)),
    NUMBERS.name: st.lists(st.floats(0.1, 0.9), min_size=1).map(tuple),
    INTEGERS.name: st.lists(st.sampled_from((1, 3, 5, 7)), min_size=1, unique=True).map(tuple),
    SIZE.name: st.integers(1, 512) | st.tuples(st.integers(1, 512), st.integers(1, 512)),
}
_IN_CONFLICTS = {key for conflict in (*CONFLICTS, *TRAINING_CONFLICTS) for key in conflict.keys}


def allowed_values(key: str) -> st.SearchStrategy:
    """Draws values that the constraints allow, for every key by its type, so that new keys are covered."""
    constraint, name = CONSTRAINTS.get(key), FIELD_TYPES[key].name
    if constraint and constraint.choices:
        return st.sampled_from([choice for choice in constraint.choices if constraint.holds(choice)])
    values = _BY_TYPE[name.removesuffix(", or null")]
    if constraint:
        values = values.filter(constraint.holds)
    return st.none() | values if name.endswith(", or null") else values


def settings_of(task: str) -> st.SearchStrategy:
    """Draws values for any of the keys that a task uses, but for those that may contradict each other."""
    keys = set(FIELD_TYPES) - _IN_CONFLICTS - set(unused_keys(task))
    optional = {key: allowed_values(key) for key in FIELD_TYPES if key in keys}
    return st.fixed_dictionaries({"TASK": st.just(task)}, optional=optional)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(TASKS)).flatmap(settings_of))
def test_a_written_configuration_reads_back_equal(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    cfg = load_config(overrides=[Override("python", key, value) for key, value in values.items()])
    path.write_text(cfg.dump(sort_keys=False))
    again = load_config(path)
    assert again == cfg
    assert repr(flatten(again)) == repr(flatten(cfg))  # 1 == 1.0 == True, their names differ


def test_a_written_configuration_is_plain_yaml(tmp_path):
    (tmp_path / "config.yaml").write_text(
        load_config(overrides=[Override("--amp", "AMP", "off")]).dump(sort_keys=False)
    )
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert tree["AMP"] == "off"
    assert tree["TRAIN"]["OPTIMIZER"]["BETAS"] == [0.9, 0.999]


def test_a_recipe_with_a_base_is_written_without_it(tmp_path):
    (tmp_path / "base.yaml").write_text("TAG: base")
    (tmp_path / "cfg.yaml").write_text("BASE: [base.yaml]")
    (tmp_path / "elsewhere").mkdir()
    cfg = load_config(tmp_path / "cfg.yaml")
    (tmp_path / "elsewhere" / "config.yaml").write_text(cfg.dump(sort_keys=False))
    assert load_config(tmp_path / "elsewhere" / "config.yaml") == cfg
