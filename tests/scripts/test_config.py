"""The scripts and the configuration fit each other: no dead key, no key that does not exist, one word for one thing."""

import ast
import re
from pathlib import Path

import pytest
import torch
from training_parts import ALONE, optimizer_of, schedule_of
from yacs.config import CfgNode

import configs
from configs import command_line
from configs.constraints import CONSTRAINTS
from tasks import TASKS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
KEYS = set(configs.flatten(configs.defaults())) - {"BASE"}
SECTIONS = {key.rsplit(".", n)[0] for key in KEYS for n in range(1, key.count(".") + 1)}
FLAGS = {
    "--cfg",
    "--opts",
    "--arch",
    "--batch-size",
    "--data-path",
    "--dataset",
    "--zip",
    "--cache-mode",
    "--resume",
    "--pretrained",
    "--accumulation-steps",
    "--use-checkpoint",
    "--amp",
    "--amp-opt-level",
    "--compile",
    "--output",
    "--tag",
    "--eval",
    "--throughput",
    "--summary",
    "--profile",
    "--local-rank",
    "--local_rank",
}


# What works by the configuration, and names in it: a whole one or, in a builder, the section that it describes.
READERS = [
    *ROOT.glob("*.py"),
    *(path for folder in ("engine", "tasks", "data") for path in (ROOT / folder).rglob("*.py")),
]
READERS.append(ROOT / "configs" / "command_line.py")


class Reads(ast.NodeVisitor):
    """Collects the dotted paths that a file reads of a configuration: `cfg.A.B`, `task.cfg.A.B`, and through aliases.

    An alias is a local name for a part: `cfg = self.cfg.DATA`, also as one of several in a tuple.
    """

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self._aliases: dict[str, str] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self._aliases
        self._aliases = dict(outer)
        for argument in node.args.args:
            self._aliases.pop(argument.arg, None)
        self.generic_visit(node)
        self._aliases = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        targets, values = node.targets, [node.value]
        if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            targets, values = targets[0].elts, node.value.elts
        for target, value in zip(targets, values, strict=False):
            path = self._resolve(value)
            if isinstance(target, ast.Name) and path is not None:
                self._aliases[target.id] = path

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._resolve(node)
        if path is None:
            self.generic_visit(node)
        elif path:
            self.paths.add(path)

    def _resolve(self, node: ast.expr) -> str | None:
        """The path below the configuration, empty for itself, None for anything else."""
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id, "" if node.id == "cfg" else None)
        if not isinstance(node, ast.Attribute):
            return None
        path = self._resolve(node.value)
        if path is None:
            return "" if node.attr in ("cfg", "config", "_cfg") else None
        if hasattr(CfgNode, node.attr):  # a method, such as cfg.dump
            return path
        return f"{path}.{node.attr}".lstrip(".")


def reads() -> set[str]:
    visitor = Reads()
    for path in READERS:
        visitor.visit(ast.parse(path.read_text()))
    return visitor.paths


def tails(key: str) -> set[str]:
    """What a key or section is called within any of its sections: `A.B.C`, `B.C`, `C`."""
    parts = key.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def choices(key: str) -> set[str]:
    return set(CONSTRAINTS[key].choices)


def test_the_reader_of_this_test_understands_aliases():
    visitor = Reads()
    visitor.visit(
        ast.parse(
            "def f(self, cfg):\n cfg, process = self.cfg.DATA, self.process\n g(cfg.ZIP, process.rank)\n"
            "def g(task):\n h(task.cfg.A.B, task.logger.info)\n cfg = task.cfg\n cfg.dump(cfg.TAG)\n"
            "def k(options):\n cfg = options.config\n return cfg.SEED\n"
        )
    )
    assert visitor.paths == {"DATA", "DATA.ZIP", "A.B", "TAG", "SEED"}


def test_every_key_is_read():
    paths = reads()
    assert {key for key in KEYS if not tails(key) & paths} == set()


def test_every_key_that_is_read_exists():
    known = {tail for key in KEYS | SECTIONS for tail in tails(key)}
    paths = reads()
    assert len(paths) > 50
    assert paths - known == set()


@pytest.mark.parametrize(
    ("folder", "foreign"),
    [(name, {"configs"}) for name in ("engine", "tasks", "data")]
    + [(n, {"configs", "yacs"}) for n in ("models", "utils")],
)
def test_the_schema_stands_above_the_library_which_knows_no_configuration(folder, foreign):
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not [name for name in modules if name.split(".")[0] in foreign], path


def test_every_flag_sets_a_key_that_exists():
    assert {key for key, _ in command_line.FLAGS.values()} <= KEYS
    assert len({key for key, _ in command_line.FLAGS.values()}) == len(command_line.FLAGS)


def test_the_flags_are_these_and_help_explains_each(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    body = text[text.index("options:") :]
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z_-]*)", body)) - {"--help"} == FLAGS
    for entry in re.split(r"\n  (?=-)", body)[1:]:
        words = entry.split()
        assert len([word for word in words if not word.startswith("-") and not word.isupper()]) >= 2, entry


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--arch", "resnet18"], "MODEL.ARCH", "resnet18"),
        (["--batch-size", "32"], "DATA.BATCH_SIZE", 32),
        (["--data-path", "/data"], "DATA.DATA_PATH", "/data"),
        (["--dataset", "cf100"], "DATA.DATASET", "cf100"),
        (["--zip"], "DATA.ZIP_MODE", True),
        (["--cache-mode", "no"], "DATA.CACHE_MODE", "no"),
        (["--resume", "a.pth"], "MODEL.RESUME", "a.pth"),
        (["--pretrained", "a.pth"], "MODEL.PRETRAINED", "a.pth"),
        (["--accumulation-steps", "4"], "TRAIN.ACCUMULATION_STEPS", 4),
        (["--use-checkpoint"], "TRAIN.USE_CHECKPOINT", True),
        (["--amp", "bf16"], "AMP", "bf16"),
        (["--amp-opt-level", "O0"], "AMP", "off"),
        (["--amp-opt-level", "O1"], "AMP", "fp16"),
        (["--amp-opt-level", "O2", "--amp", "fp16"], "AMP", "fp16"),
        (["--compile"], "COMPILE", True),
        (["--output", "out"], "OUTPUT", "out"),
        (["--tag", "t"], "TAG", "t"),
        (["--eval", "--resume", "a.pth"], "EVAL_MODE", True),
        (["--throughput"], "THROUGHPUT_MODE", True),
        (["--summary"], "SUMMARY_MODE", True),
        (["--profile"], "PROFILE_MODE", True),
        (["--opts", "TRAIN.BASE_LR", "5e-4"], "TRAIN.BASE_LR", 5e-4),
        (["--batch-size", "32", "--opts", "DATA.BATCH_SIZE", "32"], "DATA.BATCH_SIZE", 32),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_flag_sets(argv, key, value):
    found = configs.flatten(command_line.parse(argv).config)
    assert found[key] == value
    given = {key, "MODEL.RESUME"} if "--eval" in argv else {key}
    assert {k: v for k, v in found.items() if k not in given} == {
        k: v for k, v in configs.flatten(configs.load_config()).items() if k not in given
    }


@pytest.mark.parametrize("spelling", ["--local-rank", "--local_rank"])
def test_both_spellings_of_the_local_rank(spelling):
    assert command_line.parse([f"{spelling}=3"]).local_rank == 3
    assert command_line.parse([]).local_rank is None


def test_nothing_given_is_nothing_set():
    parsed = command_line.parse([])
    assert configs.flatten(parsed.config) == configs.flatten(configs.load_config())
    assert parsed.notices == []


def test_a_part_that_a_network_does_not_have_is_refused():
    for opts, part in (
        ("MODEL.BRANCHES 3", "branches"),
        ("MODEL.GLOBAL_PERCEPTRON false", "global_perceptron"),
        ("MODEL.INSERT_BN true", "insert_bn"),
        ("MODEL.MIXER conv3", "mixer"),
    ):
        cfg = configs.load_config(overrides=configs.parse_opts(["MODEL.ARCH", "resnet18", *opts.split()]))
        key = opts.split()[0]
        with pytest.raises(ValueError, match=f"{key}: resnet18 has no {part} to change"):
            TASKS["classification"](cfg, ALONE).build_network(2)


def test_the_ablations_that_the_recipe_of_the_pure_mlp_names():
    recipe = ROOT / "configs" / "cifar10_pure_mlp.yaml"
    lines = re.findall(r"^# {12}(.*?)  +(MODEL\..*)$", recipe.read_text(), re.MULTILINE)
    found = {}
    for name, opts in lines:
        cfg = command_line.parse(["--cfg", str(recipe), "--opts", *opts.split()]).config
        with torch.device("meta"):
            spec = TASKS["classification"](cfg, ALONE).build_network(10).spec
        found[name] = (spec.mixer, spec.branches, spec.global_perceptron)
    assert found == {
        "without Local": ("repmlp", (), True),
        "without Global": ("repmlp", (1, 3, 5, 7), False),
        "FC3 as conv9": ("fc3_as_conv9", (1, 3, 5, 7), True),
        "RepMLP as conv9": ("conv9", (), False),
    }


def test_an_old_flag_is_announced():
    (notice,) = command_line.parse(["--amp-opt-level", "O1"]).notices
    assert notice == "--amp-opt-level O1 is the old name of --amp fp16"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_network_fits(recipe):
    cfg = command_line.parse(["--cfg", str(recipe)]).config
    task, classes = TASKS[cfg.TASK](cfg, ALONE), {"imagenet": 1000, "cf100": 100, "cityscapes": 19}
    outputs = cfg.FACE.EMBEDDING if cfg.TASK == "verification" else classes.get(cfg.DATA.DATASET, 10)
    with torch.device("meta"):
        network = task.build_network(outputs).eval()
        answers = network(torch.empty(2, 3, *task.train_size))
    assert answers.shape == ((2, outputs, *task.train_size) if cfg.TASK == "segmentation" else (2, outputs))
    assert callable(task.train_transform())
    assert callable(task.eval_transform(task.test_size(task.train_size)))


def test_there_is_a_recipe_of_each_published_network():
    named = {command_line.parse(["--cfg", str(recipe)]).config.MODEL.ARCH for recipe in RECIPES}
    assert named >= {f"RepMLPNet-{size}" for size in ("T224", "B224", "T256", "B256", "D256", "L256")}
    assert named >= {f"RepMLP-Res50-{style}-224" for style in ("light", "bottleneck")}


def test_the_modes_of_compiling_are_known_to_torch():
    assert choices("COMPILE_MODE") <= set(torch._inductor.list_mode_options())


@pytest.mark.parametrize("name", sorted(choices("TRAIN.OPTIMIZER.NAME")))
def test_every_optimizer_of_the_rules_is_built(name):
    assert type(optimizer_of(torch.nn.Linear(2, 2), name)).__name__.lower() == name


@pytest.mark.parametrize("name", sorted(choices("TRAIN.LR_SCHEDULER.NAME")))
def test_every_schedule_of_the_rules_is_built(name):
    optimizer = optimizer_of(torch.nn.Linear(2, 2), "sgd")
    schedule_of(optimizer, name, total_updates=10, warmup_updates=2, decay_updates=3).step_update(5)


def test_the_words_of_the_flags_are_those_of_the_rules():
    for key, settings in command_line.FLAGS.values():
        if "choices" in settings:
            assert set(settings["choices"]) == choices(key)
    assert set(command_line.APEX_LEVELS.values()) <= choices("AMP")
