"""Mistakes of users: each ends in one readable line that names what is wrong and the remedy, and harms no file.

A row is a name, a command, and what its error line must say. In a command `{weights.deploy}` and the like stand for the
fixtures of that name, `{out}` for a file and `{output}` for a folder that exist already and must stay as they are.
The rows run within the process of the tests; that a process of its own ends in the same way is shown with some of them.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
ARCH = "RepMLPNet-Digits"
QUICK = f"main_repmlp.py --cfg {ROOT}/configs/quickstart.yaml --output {{output}} --tag kept"
FRESH = f"main_repmlp.py --cfg {ROOT}/configs/quickstart.yaml --output {{fresh}}"
FOLDER = f"main_repmlp.py --arch {ARCH} --batch-size 8 --output {{fresh}}"
SIZES = "DATA.IMG_SIZE 16 DATA.NUM_WORKERS 0 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
SHORT = "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1"
EVAL = f"{QUICK} --eval"

ROWS = [
    # Flags
    ("unknown_flag", f"{QUICK} --batchsize 8", ["unknown argument --batchsize", "did you mean --batch-size?"]),
    ("abbreviated_flag", f"{QUICK} --batch 8", ["unknown argument --batch", "did you mean --batch-size?"]),
    ("flag_without_value", f"{QUICK} --arch", ["--arch", "expected one argument"]),
    ("stray_word", f"{QUICK} train", ["unknown argument train", "--help"]),
    ("batch_is_no_number", f"{QUICK} --batch-size many", ["--batch-size", "'many'"]),
    ("unknown_amp", f"{QUICK} --amp fp8", ["--amp", "'fp8'", "bf16", "fp16"]),
    ("unknown_amp_level", f"{QUICK} --amp-opt-level O4", ["--amp-opt-level", "'O4'", "O1"]),
    ("unknown_cache_mode", f"{QUICK} --cache-mode all", ["--cache-mode", "'all'", "part", "full"]),
    (
        "flag_against_opts",
        f"{QUICK} --batch-size 32 --opts DATA.BATCH_SIZE 64",
        ["DATA.BATCH_SIZE", "32", "64", "keep one"],
    ),
    ("amp_against_old_amp", f"{QUICK} --amp bf16 --amp-opt-level O1", ["AMP", "--amp-opt-level", "keep one"]),
    ("test_unknown_mode", "test.py digits evaluate {weights.train}", ["'evaluate'", "train", "deploy", "check"]),
    ("test_nothing_given", "test.py", ["required", "WEIGHTS"]),
    ("test_unknown_flag", "test.py digits train {weights.train} --batchsize 3", ["did you mean --batch-size?"]),
    ("test_batch_zero", "test.py digits train {weights.train} -b 0", ["DATA.TEST_BATCH_SIZE = 0 (-b)", "at least 1"]),
    ("test_tolerance_zero", "test.py digits check {weights.train} --tolerance 0", ["--tolerance must be above 0"]),
    ("test_json_over_weights", "test.py digits train {own} --json {own}", ["own.pth is read", "another name"]),
    (
        "test_json_among_the_images",
        "test.py {images} train {own} --json {images}/val/a.json",
        ["a.json lies in {images}", "elsewhere"],
    ),
    ("test_json_is_a_folder", "test.py digits train {own} --json {guarded}", ["is a folder", "name of a file"]),
    ("predict_json_over_weights", "tools/predict.py {own} {image} --json {own}", ["own.pth is read"]),
    ("predict_json_over_image", "tools/predict.py {own} {image} --json {image}", ["0.png is read"]),
    ("predict_json_over_names", "tools/predict.py {own} {image} --classes {typo} --json {typo}", ["typo.yaml is read"]),
    (
        "test_json_over_pairs",
        "test.py {images} train {own} --json {typo} --opts FACE.PAIRS {typo}",
        ["typo.yaml is read", "another name"],
    ),
    (
        "test_unknown_data_set",
        "test.py {images} train {weights.train} --dataset imagnet",
        ["DATA.DATASET", "--dataset", "'imagnet'", "one of imagenet, cf10, cf100"],
    ),
    ("convert_nothing_given", "convert.py", ["required", "TRAIN"]),
    (
        "convert_unknown_flag",
        "convert.py {weights.train} {out} --architecture x",
        ["--architecture", "did you mean --arch?"],
    ),
    # Keys, types, values
    ("unknown_key", f"{QUICK} --opts TRAIN.BASELR 0.1", ["TRAIN.BASELR", "did you mean TRAIN.BASE_LR?"]),
    ("section_as_key", f"{QUICK} --opts TRAIN.OPTIMIZER adamw", ["TRAIN.OPTIMIZER", "TRAIN.OPTIMIZER.NAME"]),
    ("key_without_value", f"{QUICK} --opts TRAIN.EPOCHS", ["'TRAIN.EPOCHS' is left over", "KEY VALUE"]),
    ("key_with_equals_sign", f"{QUICK} --opts TRAIN.EPOCHS=3", ["TRAIN.EPOCHS=3", "KEY VALUE", "by a space"]),
    ("retired_key", f"{QUICK} --opts AMP_OPT_LEVEL O1", ["AMP_OPT_LEVEL", "no longer a key", "use AMP"]),
    ("text_for_number", f"{QUICK} --opts TRAIN.BASE_LR high", ["TRAIN.BASE_LR", "'high'", "a finite number"]),
    ("fraction_for_integer", f"{QUICK} --opts TRAIN.EPOCHS 2.5", ["TRAIN.EPOCHS", "'2.5'", "an integer"]),
    ("nan", f"{QUICK} --opts TRAIN.WEIGHT_DECAY nan", ["TRAIN.WEIGHT_DECAY", "a finite number"]),
    ("word_for_boolean", f"{QUICK} --opts DATA.PIN_MEMORY maybe", ["DATA.PIN_MEMORY", "true or false"]),
    ("negative_batch", f"{QUICK} --opts DATA.BATCH_SIZE 0", ["DATA.BATCH_SIZE", "at least 1"]),
    ("unknown_optimizer", f"{QUICK} --opts TRAIN.OPTIMIZER.NAME adam", ["TRAIN.OPTIMIZER.NAME", "adamw, lamb, sgd"]),
    ("unknown_schedule", f"{QUICK} --opts TRAIN.LR_SCHEDULER.NAME exp", ["LR_SCHEDULER.NAME", "cosine, poly, linear"]),
    ("unknown_preset", f"{QUICK} --opts AUG.PRESET raug12", ["AUG.PRESET", "raug10, raug15"]),
    ("unknown_policy", f"{FRESH} --opts AUG.PRESET null AUG.AUTO_AUGMENT rand-q7", ["AUG.AUTO_AUGMENT", "rand-m9"]),
    ("unknown_data_set", f"{QUICK} --dataset imagnet", ["DATA.DATASET", "'imagnet'", "imagenet, cf10, cf100, digits"]),
    ("warmup_too_long", f"{QUICK} --opts TRAIN.WARMUP_EPOCHS 20", ["TRAIN.WARMUP_EPOCHS", "TRAIN.EPOCHS", "lower"]),
    ("starts_too_late", f"{QUICK} --opts TRAIN.START_EPOCH 20", ["TRAIN.START_EPOCH", "no epoch is left"]),
    ("lowest_rate_above_base", f"{QUICK} --opts TRAIN.MIN_LR 1", ["TRAIN.MIN_LR", "TRAIN.BASE_LR at most"]),
    ("odd_mixed_batch", f"{FRESH} --batch-size 7 --opts AUG.MIXUP 0.4", ["DATA.BATCH_SIZE 7 is odd", "make it even"]),
    ("batch_of_the_whole_set", f"{FRESH} --batch-size 2000", ["1438", "2000", "lower DATA.BATCH_SIZE"]),
    ("too_few_classes", f"{FRESH} --opts MODEL.NUM_CLASSES 9", ["10 classes", "MODEL.NUM_CLASSES is 9"]),
    ("size_of_17", f"{FRESH} --opts DATA.IMG_SIZE 17", ["17", "multiple of", "4"]),
    ("test_size_of_17", f"{FRESH} --opts DATA.TEST_SIZE 17 {SHORT}", ["17", "16"]),
    ("unknown_arch", f"{FRESH} --arch RepMLPNet-Digit", ["'RepMLPNet-Digit'", "did you mean RepMLPNet-Digits?"]),
    (
        "throughput_unknown_arch",
        "main_repmlp.py --throughput --arch resnet19 --output {fresh}",
        ["'resnet19'", "did you mean resnet"],
    ),
    (
        "throughput_of_an_absent_part",
        "main_repmlp.py --throughput --arch resnet18 --output {fresh}/a/b --opts MODEL.BRANCHES 3",
        ["no branches"],
    ),
    ("arch_is_a_path", f"{FRESH} --arch ../../elsewhere", ["MODEL.ARCH", "plain name"]),
    ("tag_is_a_path", f"{FRESH} --tag ../../elsewhere", ["TAG", "plain name"]),
    ("resume_of_nobody", f"{FRESH} --resume ~nosuchuser/a.pth", ["MODEL.RESUME", "home of an existing user"]),
    (
        "test_data_of_nobody",
        "test.py ~nosuchuser/images train {weights.train}",
        ["~nosuchuser/images", "home of an existing user"],
    ),
    ("average_is_a_copy", f"{FRESH} --opts TRAIN.EMA_ALPHA 0.9", ["TRAIN.EMA_ALPHA = 0.9", "gives a decay of 0.99"]),
    ("huge_print_freq", f"{FRESH} --opts PRINT_FREQ 1000000000000", ["PRINT_FREQ", "at most 10000"]),
    # Files
    ("missing_cfg", "main_repmlp.py --cfg {root}/configs/quikstart.yaml", ["quikstart.yaml", "quickstart.yaml"]),
    ("cfg_is_a_folder", "main_repmlp.py --cfg {root}/configs", ["configs", "folder"]),
    ("cfg_is_a_checkpoint", "main_repmlp.py --cfg {weights.train}", ["best_ckpt.pth"]),
    (
        "cfg_with_unknown_key",
        "main_repmlp.py --cfg {typo}",
        ["TRAIN.EPOCHES", "typo.yaml", "did you mean TRAIN.EPOCHS?"],
    ),
    # Data
    (
        "no_data",
        f"{FOLDER} --data-path {{flawed.absent}} --opts {SIZES}",
        ["no class folders at {flawed.absent}/train", "digits"],
    ),
    ("default_data_path", f"{FOLDER} --opts {SIZES}", ["/path/to/imgnet", "train/<class>/*"]),
    (
        "empty_folder",
        f"{FOLDER} --data-path {{flawed.empty}} --opts {SIZES}",
        ["no class folders at {flawed.empty}/train"],
    ),
    (
        "no_train",
        f"{FOLDER} --data-path {{flawed.only_val}} --opts {SIZES}",
        ["no class folders at {flawed.only_val}/train"],
    ),
    (
        "no_val",
        f"{FOLDER} --data-path {{flawed.only_train}} --opts {SIZES}",
        ["no class folders at {flawed.only_train}/val"],
    ),
    (
        "empty_class",
        f"{FOLDER} --data-path {{flawed.empty_class}} --opts {SIZES}",
        ["no image in", "/cow", "remove the folder"],
    ),
    (
        "class_in_val_only",
        f"{FOLDER} --data-path {{flawed.unknown_class}} --opts {SIZES}",
        ["'cow'", "same class folders"],
    ),
    (
        "cut_val_image",
        f"{FOLDER} --data-path {{flawed.cut_val}} --opts {SIZES}",
        ["1 images can't be read", "val/bee/3.png"],
    ),
    (
        "text_train_image",
        f"{FOLDER} --data-path {{flawed.text_train}} --opts {SIZES} DATA.MAX_UNREADABLE 0",
        ["DATA.MAX_UNREADABLE is 0", "train/bee/3.png"],
    ),
    ("all_train_images", f"{FOLDER} --data-path {{flawed.unreadable}} --opts {SIZES}", ["cannot be read", "train/"]),
    (
        "zip_without_map",
        f"{FOLDER} --zip --data-path {{flawed.no_map}} --opts {SIZES}",
        ["train_map.txt is missing", "DATA.ZIP_MODE"],
    ),
    (
        "digits_from_a_folder",
        "main_repmlp.py --cfg {root}/configs/quickstart.yaml --output {fresh} --data-path {images}",
        ["DATA.DATASET digits", "{images} unread", "set DATA.DATASET to imagenet"],
    ),
    (
        "two_data_sets",
        f"{FOLDER} --dataset cf100 --data-path digits --opts {SIZES}",
        ["DATA.DATASET cf100", "DATA.DATA_PATH digits", "or DATA.DATASET to digits"],
    ),
    ("zip_of_digits", f"{FOLDER} --zip --data-path digits --opts {SIZES}", ["DATA.ZIP_MODE", "digits is not"]),
    (
        "test_digits_from_a_folder",
        "test.py {images} train {weights.train} --dataset digits",
        ["DATA.DATASET digits", "{images} unread", "set DATA.DATASET to imagenet"],
    ),
    ("zip_of_a_folder", f"{FOLDER} --zip --data-path {{images}} --opts {SIZES}", ["train.zip is missing"]),
    (
        "cifar_absent",
        f"{FOLDER} --dataset cf100 --data-path {{flawed.empty}} --opts {SIZES}",
        ["CIFAR-100 is missing", "DATA.DOWNLOAD True"],
    ),
    (
        "test_no_val",
        "test.py {flawed.only_train} train {weights.train} -j 0",
        ["no class folders at {flawed.only_train}/val"],
    ),
    (
        "test_other_classes",
        "test.py {images} train {weights.train} -j 0",
        ["best_ckpt.pth is for 10 classes", "{images} has 2"],
    ),
    ("test_cut_val_image", "test.py {flawed.cut_val} train {two} -j 0", ["1 images can't be read", "val/bee/3.png"]),
    # Checkpoints
    ("eval_without_weights", EVAL, ["EVAL_MODE", "MODEL.RESUME"]),
    ("eval_and_throughput", f"{EVAL} --resume {{weights.train}} --throughput", ["either EVAL_MODE or THROUGHPUT_MODE"]),
    ("eval_of_pretrained", f"{EVAL} --pretrained {{weights.train}}", ["MODEL.PRETRAINED", "MODEL.RESUME"]),
    (
        "resume_and_pretrained",
        f"{QUICK} --resume {{weights.train}} --pretrained {{weights.bare}}",
        ["give only one of them"],
    ),
    ("eval_absent", f"{EVAL} --resume {{weights.absent}}", ["absent.pth", "no such file"]),
    ("eval_folder", f"{EVAL} --resume {{weights.folder}}", ["that is a folder"]),
    ("eval_text", f"{EVAL} --resume {{weights.text}}", ["text.pth", "no checkpoint"]),
    ("eval_hollow", f"{EVAL} --resume {{weights.hollow}}", ["hollow.pth"]),
    ("eval_cut", f"{EVAL} --resume {{weights.cut}}", ["cut.pth", "damaged"]),
    ("eval_code", f"{EVAL} --resume {{weights.code}}", ["code.pth", "could run code"]),
    ("eval_list", f"{EVAL} --resume {{weights.listed}}", ["listed.pth", "holds no weights but a list"]),
    ("eval_no_tensors", f"{EVAL} --resume {{weights.no_tensors}}", ["no_tensors.pth", "holds no weights"]),
    ("eval_nothing", f"{EVAL} --resume {{weights.nothing}}", ["nothing.pth", "holds no weights"]),
    ("eval_incomplete", f"{EVAL} --resume {{weights.incomplete}}", ["2 tensors missing", "head.weight"]),
    (
        "eval_other_classes",
        f"{EVAL} --resume {{weights.seven}}",
        ["seven.pth is for 7 classes", "digits has 10"],
    ),
    ("eval_other_architecture", f"{EVAL} --resume {{weights.resnet}}", ["does not fit the network", "unexpected"]),
    (
        "eval_other_size",
        f"{FRESH} --eval --resume {{weights.train}} --opts DATA.IMG_SIZE 32",
        ["does not fit the network", "of another shape"],
    ),
    (
        "resume_deploy",
        f"{FRESH} --resume {{weights.deploy_run}} --opts {SHORT}",
        ["the optimizer's state in", "does not fit", "MODEL.PRETRAINED"],
    ),
    (
        "resume_converted",
        f"{FRESH} --resume {{weights.deploy}} --opts {SHORT}",
        ["not the state of a training", "MODEL.PRETRAINED instead of MODEL.RESUME"],
    ),
    (
        "resume_bare",
        f"{FRESH} --resume {{weights.bare}} --opts {SHORT}",
        ["not the state of a training", "MODEL.PRETRAINED instead of MODEL.RESUME"],
    ),
    ("resume_absent", f"{FRESH} --resume {{weights.absent}} --opts {SHORT}", ["absent.pth", "no such file"]),
    (
        "resume_other_optimizer",
        f"{FRESH} --resume {{weights.run}} --opts {SHORT} TRAIN.OPTIMIZER.NAME sgd",
        ["optimizer"],
    ),
    (
        "pretrained_deploy_with_branches",
        f"{FRESH} --pretrained {{weights.deploy}} --opts {SHORT} MODEL.BRANCHES 1,3",
        ["MODEL.BRANCHES 1,3", "deploy.pth are converted", "set MODEL.BRANCHES to null", "training weights"],
    ),
    ("pretrained_other", f"{FRESH} --pretrained {{weights.resnet}} --opts {SHORT}", ["does not fit the network"]),
    ("test_deploy_as_train", "test.py digits train {weights.deploy}", ["holds deploy weights", "mode deploy"]),
    ("test_train_as_deploy", "test.py digits deploy {weights.train}", ["holds train weights", "python convert.py"]),
    ("test_check_of_deploy", "test.py digits check {weights.deploy}", ["holds deploy weights", "training weights"]),
    ("test_absent", "test.py digits train {weights.absent}", ["absent.pth", "no such file"]),
    ("test_unknown_arch", "test.py digits train {weights.train} -a RepMLPNet-X", ["'RepMLPNet-X'", "did you mean"]),
    (
        "test_other_arch",
        "test.py digits train {weights.train} -a RepMLPNet-T224",
        ["does not fit", "RepMLPNet-Digits with 10 classes"],
    ),
    ("test_no_arch", "test.py digits train {weights.unknown}", ["which architecture", "name the architecture"]),
    ("test_no_ema", "test.py digits train {weights.train} --ema", ["no moving average"]),
    (
        "test_check_of_resnet",
        "test.py digits check {weights.resnet} -a resnet10t -r 32 -j 0",
        ["nothing to convert", "this ResNet has no blocks"],
    ),
    (
        "test_huge_size",
        "test.py digits train {weights.train} -r 1000000000 -j 0",
        ["DATA.TEST_SIZE = 1000000000 (-r)", "at least 1 pixel and at most 16384"],
    ),
    (
        "test_size_zero",
        "test.py digits train {weights.train} -r 0 -j 0",
        ["DATA.TEST_SIZE = 0 (-r)", "at least 1 pixel"],
    ),
    ("predict_negative_size", "tools/predict.py {weights.train} {out} -r -16", ["'-16'", "1 to 16384 pixels"]),
    ("test_other_size", "test.py digits train {weights.train} -r 17 -j 0", ["17"]),
    ("convert_converted", "convert.py {weights.deploy} {out}", ["is converted already", "nothing was written"]),
    ("convert_absent", "convert.py {weights.absent} {out}", ["absent.pth", "no such file"]),
    ("convert_cut", "convert.py {weights.cut} {out}", ["cut.pth", "damaged"]),
    ("convert_code", "convert.py {weights.code} {out}", ["could run code"]),
    ("convert_text", "convert.py {weights.text} {out}", ["text.pth", "no checkpoint"]),
    ("convert_itself", "convert.py {own} {own}", ["is read, and would be replaced", "another name"]),
    ("convert_to_folder", "convert.py {weights.train} {weights.folder}", ["is a folder", "name of a file"]),
    ("convert_other_arch", "convert.py {weights.train} {out} -a RepMLPNet-T224", ["does not fit", "RepMLPNet-Digits"]),
    ("convert_unknown_arch", "convert.py {weights.bare} {out} -a RepMLPNet-Digitz", ["did you mean RepMLPNet-Digits?"]),
    ("convert_no_arch", "convert.py {weights.unknown} {out}", ["which architecture", "name the architecture"]),
    (
        "convert_resnet",
        "convert.py {weights.resnet} {out} -a resnet10t",
        ["nothing to convert", "this ResNet has no blocks"],
    ),
    ("convert_incomplete", "convert.py {weights.holey} {out} -a {arch}", ["1 tensors missing", "fc3_bn.weight"]),
    ("convert_no_ema", "convert.py {weights.train} {out} --ema", ["no moving average"]),
]

# These also run in a fresh interpreter.
AS_USER = ["unknown_flag", "text_train_image", "resume_converted", "test_deploy_as_train", "convert_converted"]


@pytest.fixture
def places(tmp_path, trained, weights, flawed, images, two) -> SimpleNamespace:
    """What the commands refer to; everything below `guarded` must stay as it is."""
    guarded = tmp_path / "guarded"
    shutil.copytree(trained.folder, guarded / "output" / ARCH / "kept")
    (guarded / "out.pth").write_bytes(b"an older checkpoint")
    shutil.copy(weights.train, guarded / "own.pth")
    shutil.copy(images / "val" / "ant" / "0.png", guarded)
    typo = tmp_path / "typo.yaml"
    typo.write_text("TRAIN:\n  EPOCHES: 3\n")
    weights.run = trained.folder / "ckpt_epoch_0.pth"
    return SimpleNamespace(
        root=ROOT,
        arch=ARCH,
        out=guarded / "out.pth",
        own=guarded / "own.pth",
        output=guarded / "output",
        fresh=tmp_path / "fresh",
        typo=typo,
        image=guarded / "0.png",
        guarded=guarded,
        weights=weights,
        flawed=flawed,
        images=images,
        two=two,
    )


@pytest.fixture(scope="session")
def two(weights):
    """Weights of the small network for two classes."""
    import torch

    import models

    path = weights.folder / "two.pth"
    torch.save({"model": models.create_model(ARCH, 2).state_dict()}, path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the logs, which tell of the mistake, and the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt" and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check(run, places: SimpleNamespace, command: str, expected: list[str]) -> None:
    before = contents(places.guarded)
    inputs = contents(places.weights.folder)
    name, *arguments = command.format(**vars(places)).split()
    result = run(name, *arguments)
    assert "Traceback" not in result.out + result.err
    assert result.status not in (0, 1), result.out  # 1 is what Python itself ends with
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("error: ")
    for words in expected:
        assert words.format(**vars(places)) in result.err
    assert contents(places.guarded) == before
    assert contents(places.weights.folder) == inputs
    assert not list(places.fresh.rglob("*.pth"))
    # A start that fails leaves no folder; what goes wrong later leaves its log.
    assert not places.fresh.exists() or list(places.fresh.rglob("config.yaml"))


@pytest.mark.parametrize(("command", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_mistake_is_one_readable_line(call, places, command, expected):
    check(call, places, command, expected)


@pytest.mark.parametrize("name", AS_USER)
def test_the_same_from_a_fresh_interpreter(user, places, name):
    ((command, expected),) = [row[1:] for row in ROWS if row[0] == name]
    check(user, places, command, expected)


def test_the_table_is_long_and_its_names_are_unique():
    names = [row[0] for row in ROWS]
    assert len(names) == len(set(names)) >= 40


def test_a_traceback_on_demand(script, weights):
    result = script("test.py", "digits", "train", weights.absent, environment={"REPMLP_TRACEBACK": "1"})
    assert result.status != 0
    assert "Traceback" in result.err
    assert "no such file" in result.err


def test_a_folder_that_can_not_be_written(script, weights, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = script("convert.py", weights.train, tmp_path / "file" / "deploy.pth")
    assert result.status not in (0, 1)
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("error: ")
    assert (tmp_path / "file").read_text() == "in the way"
