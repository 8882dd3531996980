"""A console that vanishes or knows few characters, and Ctrl-C at any moment: no traceback, and a status that tells."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import clean_environment

from configs import load_config
from tools import soak

ROOT = Path(__file__).parents[2]
BUFFERED = "sys.stdout = open(1, 'w', closefd=False)"  # also where PYTHONUNBUFFERED says otherwise
LOST = {
    "full": f"os.dup2(os.open('/dev/full', os.O_WRONLY), 1); {BUFFERED}",
    "closed pipe": f"r, w = os.pipe(); os.close(r); os.dup2(w, 1); {BUFFERED}",
}


@pytest.fixture
def program(start, tmp_path):
    """Returns a function that runs Python lines, the last of which is `main`, in a process of its own."""

    def run(*lines: str, **options: object):
        path = tmp_path / "program.py"
        path.write_text("\n".join(["import os, signal, sys", *lines[:-1], "from utils import cli", lines[-1]]))
        return start(path, **options)

    return run


def by_shell(tmp_path: Path, lines: str, redirection: str) -> tuple[int, str]:
    """Runs Python lines with what a shell does to their streams; returns status and stderr."""
    (tmp_path / "program.py").write_text(lines)
    command = f"exec {sys.executable} {tmp_path}/program.py {redirection}"
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_stream_that_was_closed_from_the_start(tmp_path):
    lines = "from utils import cli\ndef main():\n    print('result')\n    {}\ncli.run(main)\n"
    closed = "error: the output could not be printed to stdout: it is closed\n"
    assert by_shell(tmp_path, lines.format("pass"), ">&-") == (2, closed)
    logging = "from utils.log import create_logger; create_logger().info('x')"
    assert by_shell(tmp_path, lines.format(logging), ">&-") == (0, "")
    assert by_shell(tmp_path, lines.format("raise ValueError('wrong')"), ">&- 2>&-") == (2, "")


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("amount", [1, 100_000])
def test_results_that_can_not_be_printed_are_an_error(program, how, amount):
    process = program(LOST[how], f"cli.run(lambda: print('result' * {amount}))")
    assert process.wait() == 2
    assert re.fullmatch(r"error: .*(No space left on device|Broken pipe)\n", process.err), process.err


@pytest.mark.parametrize("how", ["full", "closed pipe"])
def test_an_error_is_not_hidden_by_a_console_that_is_gone(program, how):
    process = program(LOST[how], "def main(): print('half'); raise ValueError('wrong')", "cli.run(main)")
    assert process.wait() == 2
    assert process.err == "error: wrong\n"


@pytest.mark.parametrize("how", ["full", "closed pipe"])
def test_help_that_can_not_be_printed(program, how):
    process = program(LOST[how], "sys.argv.append('--help')", "cli.run(lambda: cli.Parser().parse_args() and None)")
    assert process.wait() == 2
    assert process.err.startswith("error: the output could not be printed to stdout: ")


def test_without_stderr_the_status_remains(program):
    lost = "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)"
    process = program(lost, "def main(): raise ValueError('wrong')", "cli.run(main)")
    assert process.wait() == 2
    assert (process.out, process.err) == ("", "")


@pytest.mark.parametrize("how", [pytest.param("full", marks=pytest.mark.slow), "closed pipe"])
def test_a_training_survives_its_console(undisturbed, run, tmp_path, how):
    script, *words = soak.arguments(run.output, 0)
    path = tmp_path / "train.py"
    path.write_text(f"import os, runpy, sys\n{LOST[how]}\nrunpy.run_path({script!r}, run_name='__main__')\n")
    process = run._start(path, *words)
    assert process.wait() == 0, process.err
    assert process.err == ""
    assert run.log.count("WARNING the console is gone") == 1
    assert "Best Acc@1" in run.log
    assert soak.differences(undisturbed.folder, run.folder) == []


def test_a_console_with_an_ascii_encoding(tmp_path):
    name = "Ärger-蚂蚁"
    environment = clean_environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    words = [*soak.arguments(tmp_path, 0, {"TAG": name, "TRAIN.EPOCHS": 1, "TRAIN.WARMUP_EPOCHS": 0})]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"output in " in done.stdout
    folder = tmp_path / "RepMLPNet-Digits" / name
    assert f"weights in {folder}" in (folder / "log_rank0.txt").read_text(encoding="utf-8")
    found = load_config(folder / "config.yaml")
    assert name == found.TAG


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["main_repmlp.py", "--throughput"], 0.0),
        (["main_repmlp.py", "--throughput"], 1.5),
        (["-m", "tools.predict", "a.pth", "a.png"], 0.5),
    ],
)
def test_an_interrupt_while_a_script_imports(words, seconds, tmp_path):
    """From the moment on at which Python itself is up, which a first line on stderr tells."""
    (tmp_path / "sitecustomize.py").write_text("import sys, threading\nprint('up', file=sys.stderr, flush=True)\n")
    environment = clean_environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, *words]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "up\n"
        time.sleep(0.2 + seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    if process.returncode == 2:
        pytest.skip("the script was faster than the interrupt")
    assert process.returncode == 130
    assert err in ("", "interrupted\n")


def test_an_interrupt_in_the_work_of_a_script(program):
    process = program("import time", "cli.run(lambda: (print('works', flush=True), time.sleep(60)) and None)")
    process.until("works")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert process.err == "interrupted\n"


def test_a_second_interrupt_ends_a_training_at_once_in_one_line(run):
    process = run.start("PRINT_FREQ", 1, plan={"signal_at_update": [3, signal.SIGINT, signal.SIGINT]})
    assert process.wait() == 130
    assert process.err == "interrupted\n"
    assert not (run.folder / "latest.pth").exists()
    assert run.leftovers() == []


def test_a_background_job_that_ignores_interrupts_still_does(run):
    plan = {"ignore": signal.SIGINT, "signal_at_update": [5, signal.SIGINT, signal.SIGINT]}
    process = run.start("TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, plan=plan)
    assert process.wait() == 0, process.err
    assert "stopping on request" not in run.log
