"""The command line's manners: suggestions, one line for a mistake, a traceback for a defect."""

import signal

import pytest

from utils import cli
from utils.text import printable


def outcome(main, capsys) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code, *capsys.readouterr()


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("adam", ("adamw", "sgd"), "; did you mean adamw?"),
        ("REPMLPNET-B24", ("RepMLPNet-B224", "RepMLPNet-T224"), "; did you mean RepMLPNet-B224?"),
        ("DATA.BATCHSIZE", ("DATA.BATCH_SIZE", "DATA.IMG_SIZE"), "; did you mean DATA.BATCH_SIZE?"),
        ("--architecture", ("--arch", "-a"), "; did you mean --arch?"),
        ("TRAIN.LOSS", ("TRAIN.EPOCHS", "TRAIN.SYNC_BN"), ""),
        ("--lr", ("--help", "--amp", "-h"), ""),
        ("--device", ("--resume", "--dataset"), ""),
        ("zebra", ("adamw", "sgd"), ""),
        ("x", (), ""),
    ],
)
def test_the_closest_known_word(word, known, hint):
    assert cli.did_you_mean(word, known) == hint


@pytest.mark.parametrize(("status", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_the_status_of_main_is_that_of_the_process(capsys, status, code):
    assert outcome(lambda: status, capsys) == (code, "", "")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, OSError, PermissionError])
def test_a_mistake_of_the_user_is_one_line(capsys, monkeypatch, kind):
    monkeypatch.delenv("REPMLP_TRACEBACK", raising=False)
    assert outcome(failing(kind("no\n  such   key;\ttry another")), capsys) == (
        2,
        "",
        "error: no such key; try another\n",
    )


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, AssertionError, TypeError])
def test_a_defect_keeps_its_traceback(kind):
    with pytest.raises(kind):
        cli.run(failing(kind("a defect")))


@pytest.mark.parametrize(("words", "line"), [((), "interrupted"), (("3 of 5\n",), "3 of 5\\n")])
def test_ctrl_c_is_one_line_which_may_say_how_far_it_was(capsys, words, line):
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert outcome(failing(KeyboardInterrupt(*words)), capsys) == (130, "", f"{line}\n")
    finally:
        signal.signal(signal.SIGINT, handler)


def test_the_traceback_of_a_mistake_on_demand(monkeypatch):
    monkeypatch.setenv("REPMLP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        cli.run(failing(ValueError("wrong")))


def parser() -> cli.Parser:
    result = cli.Parser(description="d")
    result.add_argument("--batch-size", type=int)
    result.add_argument("--mode", choices=["fast", "slow"])
    return result


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--batchsize", "3"], "error: unknown argument --batchsize; did you mean --batch-size? (--help lists all)"),
        (["--batch", "3"], "error: unknown argument --batch; did you mean --batch-size? (--help lists all)"),
        (["--batchsize=3"], "error: unknown argument --batchsize; did you mean --batch-size? (--help lists all)"),
        (["--quux"], "error: unknown argument --quux (--help lists all)"),
        (["--batch-size", "many"], "error: argument --batch-size: invalid int value: 'many'"),
        (["--batch-size"], "error: argument --batch-size: expected one argument"),
    ],
)
def test_flags_that_do_not_exist_or_do_not_fit(capsys, argv, line):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(argv)
    assert stop.value.code == cli.USER_ERROR
    assert capsys.readouterr() == ("", line + "\n")


def test_a_choice_lists_the_others(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--mode", "fst"])
    error = capsys.readouterr().err
    assert error.startswith("error: argument --mode: invalid choice: 'fst'")
    assert "fast" in error
    assert "slow" in error
    assert error.count("\n") == 1


def test_a_parser_with_a_hint_of_its_own(capsys):
    with pytest.raises(SystemExit):
        cli.Parser(hint=lambda word, known: f": {word} of {len([*known])}").parse_args(["--quux=3"])
    assert capsys.readouterr().err == "error: unknown argument --quux: --quux of 2 (--help lists all)\n"


@pytest.mark.parametrize("text", ["\x1b[2J\x07", "a\udce9", "\u202e", "a\nb"])
def test_what_is_unprintable_is_escaped(capsys, text):
    shown = printable(text)
    _, _, err = outcome(failing(ValueError(f"x{text}x")), capsys)
    assert err == f"error: x{shown if chr(10) not in text else 'a b'}x\n"
    for argv in (["--mode", text], [f"--{text}"], ["--batch-size", text], [text]):
        with pytest.raises(SystemExit):
            parser().parse_args(argv)
        line = capsys.readouterr().err
        assert line.endswith("\n")
        assert line[:-1].isprintable()


def test_a_listing_is_broken_between_words():
    text = cli.listing("names", (f"name-{number}" for number in range(40)))
    assert text.startswith("names: name-0, name-1, ")
    assert max(map(len, text.splitlines())) <= 100
    assert [word.strip(",") for word in text.split()][1:] == [f"name-{number}" for number in range(40)]
