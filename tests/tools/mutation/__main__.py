"""`make mutants`: make each change of the lists in a copy of the project, and run the test that must notice it.

A change that goes unnoticed is a survivor: it needs a test, or a reason in its list (`survives`). Before that, all of the
tests run in a copy in which nothing is changed, because a test that fails there proves nothing.

    make mutants                      every change, with the result in results.md
    make mutants ONLY="CORS|mode=rw"  those whose list, file or description has this (a regular expression). What the whole
                                      run did not notice and this one does is marked in results.md
    make mutants JOBS=1               one at a time

The exit code is 0 only if every change was noticed, or survived as its list says.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

import psutil
from support.gateway import PROJECT

from . import FOLDER, Mutant, mutants

PYTEST = ["-q", "--tb=line", "-p", "no:cacheprovider", "-m", "slow or not slow"]
RESULTS = FOLDER / "results.md"

# What pytest's exit code says: a test failed, all passed. Everything else is a mistake in the list, or in the tool.
FAILED, PASSED = 1, 0


class Verdict(NamedTuple):
    """What came of a change: a word for it, what there is to say, and the seconds that it took. The words in `BAD` need work."""

    mutant: Mutant
    word: str
    more: str
    seconds: float


BAD = ("error", "SURVIVED")


def snapshot(folder: Path) -> Path:
    """Copy the project into `folder` as git would commit it now: a checkout of its own, with the same packages."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=PROJECT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, folder / name)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    # Not before git has looked, because it would take the link for one of the project's files.
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    return folder


def environ() -> dict[str, str]:
    """The environment of the tests: without the folder of this project's own modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class Runner:
    """A process that runs pytest in copies of the project, one at a time. A context manager.

    `output` is a file for what pytest prints.
    """

    def __init__(self, output: Path) -> None:
        self.output = output

    def __enter__(self) -> Self:
        command = [sys.executable, "-I", str(FOLDER / "forked.py")]
        self.process = subprocess.Popen(
            command, env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, folder: Path, *arguments: str, seconds: float = 900) -> tuple[int, str]:
        """Run pytest in a copy of the project. Returns pytest's exit code and what it printed.

        After `seconds` it is interrupted, which lets it stop the gateways that it has started.
        """
        job = {"folder": str(folder), "arguments": [*PYTEST, *arguments], "output": str(self.output)}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        pid = int(self.process.stdout.readline())
        timer = threading.Timer(seconds, os.kill, (pid, signal.SIGINT))
        timer.start()
        code = int(self.process.stdout.readline())
        timer.cancel()
        return code, self.output.read_text(errors="replace")


class Runners:
    """Some of them, for as many threads. `with runners.one() as runner` waits for none, because there are no more threads."""

    def __init__(self, runners: list[Runner]) -> None:
        self.idle = runners

    @contextlib.contextmanager
    def one(self) -> Iterator[Runner]:
        """One that is idle."""
        runner = self.idle.pop()
        try:
            yield runner
        finally:
            self.idle.append(runner)


def broken_in(original: Path, tests: Iterable[str], runners: Runners) -> set[str]:
    """Those of the tests, all of one file, that fail where nothing is changed. Raises RuntimeError where they do not run."""
    with runners.one() as runner:
        code, said = runner.run(original, *tests, seconds=3600)
    if code not in (PASSED, FAILED):
        raise RuntimeError(said[-4000:])
    if code == FAILED:
        print(said[-4000:], flush=True)
    return {name_of(test) for test in re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)}


def name_of(test: str) -> str:
    """A test without its parameters."""
    return test.partition("[")[0]


def sweep(folder: Path) -> None:
    """End what a project, changed so that it no longer ends all that it starts, has left running in `folder`."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(folder):
                process.kill()


def verdict(mutant: Mutant, original: Path, runner: Runner) -> tuple[str, str]:
    """What came of a change: a word for it, and what there is to say."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(original, Path(folder, "project"), symlinks=True)
        file = copy / mutant.file
        try:
            file.write_text(mutant.applied_to(file.read_text()))
        except (OSError, ValueError) as error:
            return "error", str(error)
        code, said = runner.run(copy, "-x", *mutant.tests)
        sweep(copy)
    if code == FAILED:
        return "caught", ""
    if code != PASSED:
        return "error", said[-2000:]
    if not re.search(r"\d+ passed", said):
        return "skipped", "Its tests are skipped on this machine."
    return "SURVIVED", f"These tests pass all the same: {' '.join(mutant.tests)}"


def try_all(tried: list[Mutant], jobs: int) -> Iterator[Verdict]:
    """Try the changes, `jobs` at a time. What came of each is there as soon as it and those before it are known."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        original = snapshot(Path(folder, "original"))
        outputs = [Path(folder, f"output-{number}") for number in range(jobs)]
        runners = Runners([stack.enter_context(Runner(output)) for output in outputs])
        tests = sorted({test for mutant in tried for test in mutant.tests})
        print(f"Running {len(tests)} tests with nothing changed ...", flush=True)
        files = [list(group) for _, group in itertools.groupby(tests, lambda test: test.partition("::")[0])]
        with ThreadPoolExecutor(jobs) as pool:
            broken = set().union(*pool.map(lambda each: broken_in(original, each, runners), files))

        def attempt(mutant: Mutant) -> Verdict:
            start = time.monotonic()
            if spoilt := broken.intersection(map(name_of, mutant.tests)):
                word, more = "error", f"Without any change this fails, and cannot show that it notices one: {' '.join(spoilt)}"
            else:
                with runners.one() as runner:
                    word, more = verdict(mutant, original, runner)
            return Verdict(mutant, word, more, time.monotonic() - start)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(attempt, tried)


def counted(verdicts: list[Verdict], known: list[Mutant]) -> str:
    """How many changes came to what."""
    words = [each.word for each in verdicts]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(["caught", *words]))
    return f"{counts}, {len(known)} left to survive for a reason"


def write_results(verdicts: list[Verdict], known: list[Mutant], jobs: int, seconds: float) -> None:
    """Write what came of all changes, with the date, for those who do not run them."""
    now, of = datetime.now(UTC), {mutant.area: 0 for mutant in mutants()}
    areas = [f"{area} {sum(mutant.area == area for mutant in mutants())}" for area in of]
    said = (
        f"Written by `make mutants` on {now:%-d %B %Y}: {len(verdicts) + len(known)} deliberate changes ({', '.join(areas)}), "
        f"each in a copy of the project in which the test that must notice it ran. {counted(verdicts, known)}. "
        f"It took {seconds / 60:.0f} minutes, {jobs} at a time."
    )
    survivors = [(each.mutant, f"**{each.word}**") for each in verdicts if each.word != "caught"]
    survivors += [(mutant, mutant.survives) for mutant in known]
    rows = [f"{row_of(mutant)}{why} |" for mutant, why in survivors]
    lines = ["# What the tests notice", "", said, "", "| not noticed | why |", "|---|---|", *rows]
    RESULTS.write_text("\n".join(lines) + "\n")


def row_of(mutant: Mutant) -> str:
    """The beginning of a change's row in the results."""
    return f"| `{mutant.file}`: {mutant.what} | "


def amend_results(verdicts: list[Verdict]) -> None:
    """Mark in the results what the whole run did not notice, and a later run of a part does."""
    if not RESULTS.exists():
        return
    text, today = RESULTS.read_text(), f"{datetime.now(UTC):%-d %B %Y}"
    caught = [row_of(each.mutant) for each in verdicts if each.word == "caught"]
    for row, word in itertools.product(caught, BAD):
        text = text.replace(f"{row}**{word}** |", f"{row}**{word}** in the whole run, caught in a later one on {today} |")
    RESULTS.write_text(text)


def main() -> int:
    """Try the changes and print what came of each. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="make mutants", description="Change the project, and see which test notices.")
    parser.add_argument("--only", default="", help="only changes whose list, file or description has this regular expression")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: %(default)s)")
    options = parser.parse_args()
    chosen = [each for each in mutants() if re.search(options.only, f"{each.area}.yaml {each}", re.IGNORECASE)]
    known = [mutant for mutant in chosen if mutant.survives]
    tried = [mutant for mutant in chosen if not mutant.survives]
    if not chosen:
        print(f"No change has “{options.only}” in its list, in its file's name or in its description.", file=sys.stderr)
        return 1
    start, verdicts = time.monotonic(), []
    try:
        for each in try_all(tried, options.jobs):
            verdicts.append(each)
            more = f"\n          {each.more}" if each.more else ""
            print(f"{each.word:9} {each.mutant} ({each.seconds:.0f} s, {len(verdicts)} of {len(tried)}){more}", flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for mutant in known:
        print(f"{'survives':9} {mutant}\n          {mutant.survives}")
    seconds = time.monotonic() - start
    print(f"\n{counted(verdicts, known)}. It took {seconds / 60:.1f} minutes.")
    if options.only:
        amend_results(verdicts)
    else:
        write_results(verdicts, known, options.jobs, seconds)
    return int(any(each.word in BAD for each in verdicts))


if __name__ == "__main__":
    # A shell that starts this in the background ignores SIGINT, which the tests, and what they start, would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # So that a SIGTERM, like Ctrl-C, leaves nothing running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
