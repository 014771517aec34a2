"""The README is true: every block in it runs as written, and its tables say what run.yaml says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from world.calls import MODELS, RUN_YAML, vendor_of
from world.gateway import PROJECT, Gateway, clean_environ, eventually, listening
from world.vendors import KEY_VARIABLES, VENDORS, Vendors

README = (PROJECT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PORT = 8321  # The README's own.


def blocks(language: str) -> list[str]:
    """The README's blocks in a language, in order."""
    return [text for kind, text in BLOCKS if kind == language]


def is_server(block: str) -> bool:
    """Whether a block starts a gateway, and so does not end by itself."""
    return "make server" in block or "llama stack run" in block


def wait_for_port() -> None:
    """Wait until nothing listens on the README's port. Fails after a minute, because the blocks can then not be run as written."""
    if not eventually(lambda: not listening(PORT), 60):
        pytest.fail(f"Something listens on port {PORT}, which the README's examples use. Stop it, and run the tests again.")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a new user has it, with no .env, but with this project's packages installed."""
    folder = tmp_path_factory.mktemp("clone") / "lls-openai"
    leave_out = shutil.ignore_patterns(".git", ".env", ".venv", ".uv", ".bench", "__pycache__", ".ruff_cache")
    shutil.copytree(PROJECT, folder, ignore=leave_out)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test_every_block_runs_as_written(copy: Path, vendors: Vendors, tmp_path: Path) -> None:
    wait_for_port()
    config = yaml.safe_load((copy / "run.yaml").read_text())
    for block in blocks("yaml"):
        config["registered_resources"]["models"] += yaml.safe_load(block)
    (copy / "run.yaml").write_text(yaml.safe_dump(config))

    gateway = None
    try:
        script = "set -eu\n"
        for block in [*blocks("sh"), None]:
            if block is not None and not is_server(block):
                # This suite is what `make test` runs.
                script += "\n".join(line for line in block.splitlines() if not line.startswith("make test")) + "\n"
                if ".env.example" in block:
                    script += "".join(f"sed -i 's/^{name}=$/&{key}/' .env\n" for name, key in KEY_VARIABLES.items())
                continue
            ended = subprocess.run(
                ["bash", "-c", script],
                cwd=copy,
                env=clean_environ(tmp_path),
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert ended.returncode == 0, ended.stderr
            assert '"error"' not in ended.stdout
            if "curl" in script:
                for vendor in VENDORS.values():
                    assert f"This is a stand-in for {vendor.title}" in ended.stdout
                assert ended.stdout.count('"embedding":[') == 2
                assert "openai/gpt-4.1" in ended.stdout, "the model of the YAML block is not listed"
            if gateway:
                run_python(copy, tmp_path)
                gateway.stop()
            script = "set -eu\n"
            if block:
                gateway = Gateway(tmp_path, ("bash", "-c", block), copy, LLAMA_STACK_PORT=str(PORT), **vendors.environ()).start()
    finally:
        if gateway:
            gateway.stop()


def run_python(copy: Path, home: Path) -> None:
    """Run the README's Python blocks, in order and as one program."""
    program = [sys.executable, "-c", "\n".join(blocks("python"))]
    ended = subprocess.run(
        program, cwd=copy, env=clean_environ(home, **KEY_VARIABLES), capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    for vendor in VENDORS.values():
        assert f"This is a stand-in for {vendor.title}" in ended.stdout


def test_no_block_is_left_out() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh", "yaml", "python", "text"}
    assert README.count("```") == 2 * len(BLOCKS)


def test_the_model_table_is_that_of_run_yaml() -> None:
    titles = {vendor.name: vendor.title for vendor in VENDORS.values()}
    names = {model["model_id"]: model["metadata"]["display_name"] for model in RUN_YAML["registered_resources"]["models"]}
    rows = [f"| `{model}` | {titles[vendor_of(model)]} | {names[model]} |" for model in MODELS]
    table = README.partition("<!-- models -->\n")[2].partition("<!-- /models -->")[0]
    assert table.splitlines()[2:] == rows


def test_the_settings_table_has_every_setting_of_run_yaml_with_its_default() -> None:
    for name, default in re.findall(r"\$\{env\.(\w+):=([^}]+)}", (PROJECT / "run.yaml").read_text()):
        assert f"| `{name}` | `{default}` |" in README


def test_every_target_has_its_line_in_make_help(tmp_path: Path) -> None:
    makefile = (PROJECT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    environ = clean_environ(tmp_path)
    shown = subprocess.run(["make", "help"], cwd=PROJECT, env=environ, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in shown.splitlines()] == targets


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in README
    assert (PROJECT / ".ci/run").read_text().splitlines()[-1] == "exec make test"
