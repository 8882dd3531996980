"""How many small changes of the code, each of which should break something, the tests notice.

    python -m tests.mutations --sample 60 --seed 0 --traces /tmp/traces

Every mutation (see `tests/mutation_sites.py`) is made in a copy of the checkout, never in the checkout itself. The
tests that execute the changed statement are run, fastest first; which ones these are comes from one traced run of all
tests, which must pass.
"""

import argparse
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.mutation_sites import Mutation, find_mutations

ROOT = Path(__file__).parents[1]
MUTATED = (
    "models/*.py",
    "engine/*.py",
    "configs/*.py",
    "data/samplers.py",
    "data/batch_augmentation.py",
    "utils/distributed.py",
)
FIRST = 15.0  # seconds of tests that are tried before pytest is started a second time for the others
# Processes are forked from one that has done the imports that take seconds.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch.utils.tensorboard", "timm", "segmentation_models_pytorch", "hypothesis"])


@dataclass
class Trace:
    """The tests in the order in which they ran, the seconds that each takes, and which of them execute a line."""

    seconds: dict[str, float] = field(default_factory=dict)
    of_line: defaultdict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, file: Path) -> None:
        lines: set[tuple[str, int]] = set()
        started = 0.0
        for entry in file.read_text().splitlines():
            if entry.startswith(">"):
                started, lines = float(entry.split(" ", 2)[1]), set()
            elif entry.startswith("<"):
                _, ended, test = entry.split(" ", 2)
                self.seconds[test] = float(ended) - started
                for line in lines:
                    self.of_line[line].add(test)
            else:
                path, _, number = entry.rpartition(":")
                lines.add((path, int(number)))

    def tests_for(self, mutation: Mutation, text: str) -> list[str]:
        """Those that execute the statement, then the others of their files, which may share fixtures; fastest first.

        Statements outside of functions are executed at import. For these it is the tests that execute any line of the
        file, and first the ones whose parameters are named in `text`, the line itself: architectures, keys.
        """
        lines, words = [(mutation.path, line) for line in mutation.lines], []
        if not lines:
            lines, words = [line for line in self.of_line if line[0] == mutation.path], re.findall(r"[\w.-]{4,}", text)
        hits = set[str]().union(*(self.of_line[line] for line in lines))
        files = {file_of(test) for test in hits}
        candidates = [test for test in self.seconds if file_of(test) in files]
        named = {test for test in candidates if any(word in test.partition("[")[2] for word in words)}
        return sorted(candidates, key=lambda test: (test not in hits, test not in named, self.seconds[test]))


def file_of(test: str) -> str:
    return test.partition("::")[0]


def run_pytest(root: Path, command: list[str], environment: dict[str, str], output: Path) -> None:
    """Runs pytest in this process, which knows nothing of the project yet, on the copy in `root`."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.chdir(root)
    os.environ.update(environment)
    sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.path[1:1] = filter(None, [environment.get("PYTHONPATH")])
    sys.exit(pytest.main(command))


class Copy:
    """A copy of the checkout to run tests in."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def pytest(self, tests: list[str], seconds: float, *options: str, **environment: str) -> tuple[int | None, str]:
        """Runs tests, up to the first that fails; returns the status, None where time was up, and the output."""
        listed, output = self.root / "tests.txt", self.root / "output.txt"
        listed.write_text("\n".join(tests))
        command = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "--assert=plain", *options, f"@{listed}"]
        run = FORKED.Process(target=run_pytest, args=(self.root, command, environment, output))
        run.start()
        run.join(seconds)
        status = run.exitcode
        if status is None:
            os.kill(run.pid, signal.SIGINT)  # so that fixtures end the processes that they have started
            run.join(30)
            run.kill()
            run.join()
        return status, output.read_text(errors="replace")

    def trace(self, tests: list[str], file: Path) -> None:
        """Runs tests that must pass, with every line that they execute in `file`."""
        plugin = self.root / ".trace" / "sitecustomize.py"
        plugin.parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / "tests" / "line_trace.py", plugin)
        unfinished = file.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        variables = {"PYTHONPATH": str(plugin.parent), "LINE_TRACE": str(unfinished), "LINE_TRACE_ROOT": str(self.root)}
        status, output = self.pytest(tests, 7200, "-p", "sitecustomize", **variables)
        if status != 0:
            sys.exit(f"the tests fail without a mutation:\n{output}")
        unfinished.rename(file)

    def try_mutation(self, mutation: Mutation, trace: Trace, budget: float) -> str:
        """Returns which test notices a mutation first, empty where none does within so many seconds of tests."""
        file = self.root / mutation.path
        source = file.read_bytes()
        total, parts = 0.0, ([], [])
        for test in trace.tests_for(mutation, source.splitlines()[mutation.line - 1].decode()):
            total += trace.seconds[test]
            if total > budget and total > trace.seconds[test]:
                break
            parts[total > FIRST].append(test)
        file.write_bytes(mutation.apply(source))
        try:
            return next(filter(None, (self._first_failure(part, trace) for part in parts if part)), "")
        finally:
            file.write_bytes(source)

    def _first_failure(self, tests: list[str], trace: Trace) -> str:
        files = list(dict.fromkeys(map(file_of, tests)))
        grouped = sorted(tests, key=lambda test: files.index(file_of(test)))  # fixtures of a file are made once
        limit = 120 + 5 * sum(trace.seconds[test] for test in tests)
        status, output = self.pytest(grouped, limit)
        if status == 4:  # a test's id has changed with what it is made of
            status, output = self.pytest(files, limit + 300)
        if status == 0:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        return failed[1] if failed else "timeout" if status is None else f"pytest's status {status}"


def test_groups() -> dict[str, list[str]]:
    """Returns the folders of tests, and the files beside them, by name."""
    folders = sorted({path.parent for path in (ROOT / "tests").glob("*/test_*.py")})
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return {"top": [str(path.relative_to(ROOT)) for path in files]} | {
        path.name: [str(path.relative_to(ROOT))] for path in folders
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=60, help="mutations to try, drawn evenly from all; 0: every one")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the checkout that are worked in at once")
    parser.add_argument("--budget", type=float, default=120, help="seconds of tests that may notice a mutation")
    parser.add_argument("--only", default="*", help="pattern of the files to mutate, as models/*")
    parser.add_argument("--traces", type=Path, help="folder to keep the traces in; those that it holds are used again")
    parser.add_argument("--list", action="store_true", help="name the drawn mutations and try none")
    arguments = parser.parse_args()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell switches off for what it runs behind
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    names = [str(path.relative_to(ROOT)) for pattern in MUTATED for path in sorted(ROOT.glob(pattern))]
    sources = {name: (ROOT / name).read_bytes() for name in names if fnmatchcase(name, arguments.only)}
    mutations = [mutation for name, source in sources.items() for mutation in find_mutations(name, source)]
    drawn = random.Random(arguments.seed).sample(mutations, min(arguments.sample or len(mutations), len(mutations)))
    print(f"{len(drawn)} of {len(mutations)} mutations in {len(sources)} files", flush=True)
    if arguments.list:
        sys.exit("\n".join(mutation.describe(sources[mutation.path]) for mutation in drawn))

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(arguments.jobs) as pool:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for job in range(arguments.jobs):
            copies.put(Copy(Path(temporary) / str(job)))

        @contextmanager
        def a_copy() -> Iterator[Copy]:
            copy = copies.get()
            try:
                yield copy
            finally:
                copies.put(copy)

        traces = arguments.traces or Path(temporary)
        traces.mkdir(parents=True, exist_ok=True)

        def make_trace(group: tuple[str, list[str]]) -> None:
            file = traces / f"{group[0]}.trace"
            if not file.exists():
                with a_copy() as copy:
                    copy.trace(group[1], file)

        list(pool.map(make_trace, test_groups().items()))
        trace = Trace()
        for file in sorted(traces.glob("*.trace")):
            trace.add(file)
        print(f"{len(trace.seconds)} tests, {sum(trace.seconds.values()):.0f} s", flush=True)

        def attempt(mutation: Mutation) -> str:
            with a_copy() as copy:
                started = time.monotonic()
                noticed_by = copy.try_mutation(mutation, trace, arguments.budget)
            said = mutation.describe(sources[mutation.path])
            result = "noticed " if noticed_by else "SURVIVED"
            print(f"{result} {time.monotonic() - started:5.0f} s  {said}  {noticed_by}", flush=True)
            return noticed_by

        results = list(pool.map(attempt, drawn))
    survivors = [mutation for mutation, noticed_by in zip(drawn, results, strict=True) if not noticed_by]
    print("\nsurvivors:", *(mutation.describe(sources[mutation.path]) for mutation in sorted(survivors)), sep="\n  ")
    noticed = len(drawn) - len(survivors)
    print(f"noticed {noticed} of {len(drawn)} ({100 * noticed / len(drawn):.0f} %)")


if __name__ == "__main__":
    main()
