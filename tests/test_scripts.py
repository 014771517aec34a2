"""The shell under deploy/: without a complaint of a linter, and short enough to be read in one go."""

import subprocess
from pathlib import Path

import pytest
from support.gateway import PROJECT, clean_environ

SCRIPTS = sorted((PROJECT / "deploy").rglob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(PROJECT)))
def test_shellcheck_has_no_complaint(tmp_path: Path, script: Path) -> None:
    """As POSIX sh, which macOS and Alpine have as well."""
    command = ["shellcheck", "--shell=sh", "--severity=warning", script]
    done = subprocess.run(command, env=clean_environ(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_of_it_is_readable_in_one_go() -> None:
    assert sum(len(script.read_text().splitlines()) for script in SCRIPTS) <= 220


def test_every_file_that_a_script_names_is_there() -> None:
    for script in SCRIPTS:
        words = script.read_text().replace('"', " ").replace(";", " ").split()
        for word in words:
            if word.startswith("deploy/") and not word.endswith("/"):
                assert (PROJECT / word.rstrip(").,")).exists(), f"{script.name} names {word}"
