"""`make mutants`: make each change of the lists in a copy of the project, and run the test that must notice it.

A change that goes unnoticed is a survivor: it needs a test, or a reason in its list (`survives`). Before that, all of the
tests run in a copy in which nothing is changed, because a test that fails there proves nothing.

    make mutants                      every change
    make mutants ONLY="CORS|mode=rw"  those whose file or description has this (a regular expression)
    make mutants JOBS=1               one at a time

The exit code is 0 only if every change was noticed, or survived as its list says.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from support.gateway import PROJECT

from . import Mutant, mutants

PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "slow or not slow"]

# What pytest's exit code says: a test failed, all passed. Everything else is a mistake in the list, or in the tool.
FAILED, PASSED = 1, 0


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


def run(folder: Path, *arguments: str, seconds: float = 900) -> tuple[int, str]:
    """Run pytest in a copy of the project. Returns pytest's exit code and what it printed.

    After `seconds` it is interrupted, which lets it stop the gateways that it has started.
    """
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [*PYTEST, *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    return process.returncode, said


def sweep(folder: Path) -> None:
    """End what a project, changed so that it no longer ends all that it starts, has left running in `folder`."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(folder):
                process.kill()


def verdict(mutant: Mutant, original: Path) -> tuple[str, str]:
    """What came of a change: a word for it, and what there is to say. The words in `BAD` need work."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(original, Path(folder, "project"), symlinks=True)
        file = copy / mutant.file
        try:
            file.write_text(mutant.applied_to(file.read_text()))
        except (OSError, ValueError) as error:
            return "error", str(error)
        code, said = run(copy, "-x", *mutant.tests)
        sweep(copy)
    if code == FAILED:
        return "caught", ""
    if code != PASSED:
        return "error", said[-2000:]
    if not re.search(r"\d+ passed", said):
        return "skipped", "Its tests are skipped on this machine."
    return "SURVIVED", f"These tests pass all the same: {' '.join(mutant.tests)}"


BAD = ("error", "SURVIVED")


def main() -> int:
    """Try the changes and print what came of each. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="make mutants", description="Change the project, and see which test notices.")
    parser.add_argument("--only", default="", help="only changes whose file or description has this regular expression")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: %(default)s)")
    options = parser.parse_args()
    chosen = [mutant for mutant in mutants() if re.search(options.only, str(mutant), re.IGNORECASE)]
    known = [mutant for mutant in chosen if mutant.survives]
    tried = [mutant for mutant in chosen if not mutant.survives]
    if not chosen:
        print(f"No change has “{options.only}” in its file's name or in its description.", file=sys.stderr)
        return 1

    def attempt(mutant: Mutant) -> str:
        start = time.monotonic()
        if spoilt := broken.intersection(mutant.tests):
            word, more = "error", f"Without any change this fails, and cannot show that it notices one: {' '.join(spoilt)}"
        else:
            word, more = verdict(mutant, original)
        print(f"{word:9} {mutant} ({time.monotonic() - start:.0f} s)" + (f"\n          {more}" if more else ""), flush=True)
        return word

    with tempfile.TemporaryDirectory() as folder:
        original = snapshot(Path(folder, "original"))
        tests = sorted({test for mutant in tried for test in mutant.tests})
        print(f"Running {len(tests)} tests with nothing changed ...", flush=True)
        code, said = run(original, *tests, seconds=3600) if tests else (PASSED, "")
        if code not in (PASSED, FAILED):
            print(said[-4000:], file=sys.stderr)
            return 1
        # Their names, without parameters and without what was wrong.
        broken = set(re.findall(r"^(?:FAILED|ERROR) ([^\s[]+)", said, re.MULTILINE))
        with ThreadPoolExecutor(options.jobs) as pool:
            words = list(pool.map(attempt, tried))
    for mutant in known:
        print(f"{'survives':9} {mutant}\n          {mutant.survives}")
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(["caught", *words]))
    print(f"\n{counts}, {len(known)} left to survive for a reason.")
    return int(any(word in BAD for word in words))


if __name__ == "__main__":
    # A shell that starts this in the background ignores SIGINT, which the tests, and what they start, would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # So that a SIGTERM, like Ctrl-C, leaves nothing running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
