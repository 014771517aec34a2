"""Clients in JavaScript on the running gateway: the openai package, and the AI SDK with each provider that fits.

They need node and npm, and what npm installs beside them: the releases in tests/node/package.json, or, with NEWEST_NODE set,
the newest that run on this node.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.calls import ALL_KEYS
from support.gateway import PROJECT, PROVIDER_DATA, Gateway, clean_environ
from support.vendors import BESIDE, KEYS, STRUCTURED, VENDORS

SCRIPTS = PROJECT / "tests" / "node"
INSTALL = (
    "npm install --prefer-offline --fetch-retries=0 --no-package-lock --ignore-scripts --no-audit --no-fund --no-update-notifier"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts and the packages that they import. Skips where these cannot be had."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not installed")
    folder = SCRIPTS
    if os.environ.get("NEWEST_NODE"):
        folder = Path(shutil.copytree(SCRIPTS, tmp_path_factory.mktemp("node") / "newest", ignore=lambda *_: {"node_modules"}))
        package = json.loads((folder / "package.json").read_text())
        package["dependencies"] = dict.fromkeys(package["dependencies"], "*")
        (folder / "package.json").write_text(json.dumps(package))
    try:
        subprocess.run(INSTALL.split(), cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm had not installed the packages after two minutes")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"npm cannot install the packages: {error.stderr.strip().splitlines()[0]}")
    return folder


def run(gateway: Gateway, folder: Path, script: str, vendor: str) -> dict[str, object]:
    """What a script printed, by the names of its calls."""
    command = ["node", script, f"{gateway.url}/v1", ALL_KEYS[PROVIDER_DATA], vendor]
    settings = {"cwd": folder, "env": clean_environ("/nonexistent"), "capture_output": True, "text": True, "timeout": 120}
    ran = subprocess.run(command, check=False, **settings)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(line) for line in ran.stdout.splitlines())


def talk(vendor: str, model: str, prompt: str = "Hello") -> str:
    """What a stand-in says."""
    title = next(each.title for each in VENDORS.values() if each.name == vendor)
    return f"This is a stand-in for {title}, not {model} itself. You said: {prompt}"


@pytest.mark.parametrize("vendor", KEYS)
def test_the_openai_package(gateway: Gateway, folder: Path, vendor: str) -> None:
    spoken = dict.fromkeys(("responses", "responses stream", "responses helper", "chat", "chat stream"), talk(vendor, "any"))
    assert run(gateway, folder, "openai.mjs", vendor) == spoken | {
        "responses tool": talk(vendor, "tool-call", "21 in Paris"),
        "chat 429": 429,
        "responses 429": 500,
    }


@pytest.mark.parametrize("vendor", KEYS)
def test_the_ai_sdk(gateway: Gateway, folder: Path, vendor: str) -> None:
    """Its default for OpenAI speaks Responses; `.chat`, and the provider for compatible servers, speak Chat.

    Claude says something before it calls a tool, and by Responses the call is lost then. Gemini's streamed calls have no index,
    which `.chat` wants, and Responses makes one of two. Where `top_logprobs` is null, a word is lost to both.
    """
    expected: dict[str, object] = {}
    for name, status in (("default", 500), ("chat", 429), ("compatible", 429)):
        spoken = {name: talk(vendor, "any"), f"{name} stream": talk(vendor, "any")}
        spoken[f"{name} no top_logprobs"] = talk(vendor, "no-top-logprobs")
        tool = talk(vendor, "tool-call", "21 in Paris")
        tools = {f"{name} tool": tool, f"{name} streamed tool": BESIDE * (vendor == "anthropic") + tool}
        expected |= spoken | tools | {f"{name} streamed tools": ["Paris", "Rome"]}
        expected |= {f"{name} object": json.loads(STRUCTURED), f"{name} 429": status}
    if vendor == "gemini":
        expected |= {"default streamed tools": [], "chat streamed tool": "", "chat streamed tools": []}
    if vendor == "anthropic":
        expected["default streamed tool"] = BESIDE
    if vendor == "openai":
        for name in ("default", "chat"):
            expected[f"{name} no top_logprobs"] = talk(vendor, "no-top-logprobs").removeprefix("This")
    assert run(gateway, folder, "ai-sdk.mjs", vendor) == expected
