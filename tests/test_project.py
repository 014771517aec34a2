"""What the project promises about itself: its size, its layout, and that `make demo` cleans up after itself."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest
from support.calls import caller, chat
from support.gateway import HAPROXY, PROJECT, alive, clean_environ, wait_for
from support.terminal import Terminal

TRACKED = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=False).stdout.splitlines()


def test_the_server_takes_at_most_125_mb(tmp_path: Path) -> None:
    """The installed files of the runtime packages, in bytes on disk, as `uv sync` without the dev group lays them out."""
    export = ["uv", "export", "--frozen", "--no-dev", "--no-hashes", "--no-header", "--no-annotate", "--offline"]
    environ = clean_environ(tmp_path)
    lines = subprocess.run(export, cwd=PROJECT, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()
    size = 0
    for line in lines:
        name, _, marker = line.partition(" ; ")
        if "python_full_version < '0'" in marker or "python_version < '0'" in marker or "win32'" in marker:
            continue
        for file in distribution(name.partition("==")[0]).files or []:
            path = Path(str(file.locate()))
            size += path.stat().st_blocks * 512 if path.exists() else 0
    assert 50_000_000 < size < 125_000_000


def test_runtime_packages_are_the_three() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    names = [re.split(r"[=<>]", name)[0] for name in project["project"]["dependencies"]]
    assert names == ["llama-stack", "httpx", "python-dotenv"]


def test_the_lock_is_of_this_pyproject(tmp_path: Path) -> None:
    """uv would lock anew without a word where an index can be reached, with whatever versions there are that day."""
    check = ["uv", "lock", "--check", "--offline"]
    done = subprocess.run(
        check, cwd=PROJECT, env=clean_environ(tmp_path), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_python_lives_in_main_the_start_and_tests_alone() -> None:
    ours = ("main.py", "deploy/start/", "tests/")
    assert [name for name in TRACKED if name.endswith(".py") and not name.startswith(ours)] == []


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_only_the_lock_names_a_package_index() -> None:
    hosts = re.compile(r"py[p]i\.org|python[h]osted|registry\.[n]pm")
    named = [name for name in TRACKED if name != "uv.lock" and hosts.search((PROJECT / name).read_text(errors="replace"))]
    assert named == []


def test_the_start_needs_pythons_library_and_pyyaml_alone() -> None:
    """So that it takes little memory beside the server, and imports nothing of it."""
    files = list((PROJECT / "deploy" / "start").glob("*.py"))
    imports = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    names = {name for file in files for name in imports.findall(file.read_text())}
    assert names - sys.stdlib_module_names - {file.stem for file in files} == {"yaml"}
    assert not {file.stem for file in files} & sys.stdlib_module_names, "-P leaves the start's folder first among them"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_leaves_nothing_running_when_it_is_interrupted(tmp_path: Path, number: int) -> None:
    demo = psutil.Popen(
        ["make", "demo"], cwd=PROJECT, env=clean_environ(tmp_path), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert "Stand-ins answer here" in demo.stdout.readline()

    def arguments(process: psutil.Process) -> list[str]:
        """Those of a process, or none once it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.cmdline()
        return []

    wait_for(lambda: any("run.yaml" in arguments(each) for each in demo.children(recursive=True)))
    started = demo.children(recursive=True)
    if number == signal.SIGINT:  # Ctrl-C reaches the whole process group of the terminal,
        os.killpg(demo.pid, number)
    else:  # and kill one process.
        demo.send_signal(number)
    assert demo.wait(60) != 0
    wait_for(lambda: not any(map(arguments, started)), seen=lambda: list(filter(None, map(arguments, started))))


def test_advisories_that_cannot_be_had_are_a_sentence(tmp_path: Path) -> None:
    settings = {"HTTPS_PROXY": "http://127.0.0.1:9", "UV_HTTP_RETRIES": "0"}
    told = subprocess.run(
        ["make", "advisories"], cwd=PROJECT, env=clean_environ(tmp_path, **settings), capture_output=True, text=True, check=False
    )
    assert told.returncode != 0
    assert "The advisories could not be listed." in told.stderr


def test_demo_stays_with_a_page_until_it_is_stopped(tmp_path: Path) -> None:
    """Both ways work with the fake key that it names: through the server, and past it to the vendor's own API."""
    with Terminal(("make", "demo", "STAY=1"), clean_environ(tmp_path)) as demo:
        if not HAPROXY:
            demo.wait_for("need HAProxy 2.6 or later")
        demo.wait_for("Ctrl-C ends all of it.")
        if HAPROXY:
            url = re.search(r"Open (\S+) in your browser", demo.screen)[1]
            with caller(url) as client:
                assert "<title>" in client.get("/").text
                for path, model in (("/v1", "openai/gpt-4o"), ("/openai/v1", "gpt-4o")):
                    key = {"Authorization": "Bearer sk-fake-openai" if path != "/v1" else "Bearer openai=sk-fake-openai"}
                    assert client.post(f"{path}/chat/completions", headers=key, json=chat(model)).is_success
        started = psutil.Process(demo.process.pid).children(recursive=True)
        demo.press(b"\x03")
        demo.wait()
        wait_for(lambda: not any(map(alive, started)), seen=lambda: list(filter(alive, started)))
