"""The test world: stand-in vendors, the gateway as `make server` starts it, and the callers' headers."""

import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from gateway import PROJECT, PROVIDER_DATA, Gateway, copy_project
from vendors import KEYS, Vendors

RUN_YAML = yaml.safe_load((PROJECT / "run.yaml").read_text())
MODELS = [model["model_id"] for model in RUN_YAML["registered_resources"]["models"]]

# The two embeddings models that users are promised, by the provider that serves them.
EMBEDDINGS = ["openai/text-embedding-3-small", "gemini-native/gemini-embedding-001"]

# One header for every model.
ALL_KEYS = {
    PROVIDER_DATA: json.dumps(
        {f"{vendor}_authorization": f"Bearer {key}" for vendor, key in KEYS.items()} | {"gemini_api_key": KEYS["gemini"]}
    )
}


WRONG_KEY = {PROVIDER_DATA: json.dumps({"openai_authorization": "Bearer sk-fake-wrong"})}

# The client libraries that the tests use, which may be other releases than those in uv.lock.
LIBRARIES = ("openai", "langchain-openai", "llama-stack-client")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="write what the tests of faults measured to this file, as a table")


def pytest_report_header() -> str:
    """Name the releases of the client libraries."""
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def vendor_of(model: str) -> str:
    """The vendor behind a model: openai for openai-mini/gpt-4o-mini."""
    return model.replace("-", "/").split("/")[0]


def one_key(model: str) -> dict[str, str]:
    """The older form of the header: the key for this one call, and a URL that is ignored."""
    return {
        PROVIDER_DATA: json.dumps({"passthrough_api_key": KEYS[vendor_of(model)], "passthrough_url": "https://api.openai.com"})
    }


def chat(model: str, prompt: str = "Hello", **more: object) -> dict:
    """The body of a chat call."""
    return {"model": model, "messages": [{"role": "user", "content": prompt}]} | more


# Calls that the server complains about, each with SECRET in it.
SECRET = "sk-fake-hidden"
MALFORMED = [
    {"json": {"model": MODELS[0], "messages": SECRET}, "headers": ALL_KEYS},
    {"json": chat(SECRET), "headers": ALL_KEYS},
    {"json": chat(MODELS[0], tools=[{"type": SECRET}]), "headers": ALL_KEYS},
    {"json": chat(MODELS[0], temperature=SECRET), "headers": ALL_KEYS},
    {"json": chat(MODELS[0], **{SECRET: 1}), "headers": ALL_KEYS},
    {"json": chat(MODELS[0]), "headers": {PROVIDER_DATA: json.dumps({"passthrough_api_key": [SECRET]})}},
    {"json": chat(MODELS[0]), "headers": {PROVIDER_DATA: json.dumps({"passthrough_url": SECRET})}},
    {"json": chat(MODELS[0]), "headers": {PROVIDER_DATA: SECRET}},
    {"json": chat("gemini-native/x"), "headers": {PROVIDER_DATA: json.dumps({"gemini_api_key": {"a": SECRET}})}},
]


def events(response: httpx.Response) -> list[dict]:
    """The server-sent events of a streamed answer, without a closing [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def streamed_text(response: httpx.Response) -> str:
    """The text of a streamed answer."""
    return "".join(choice["delta"]["content"] or "" for event in events(response) for choice in event["choices"])


def message(response: httpx.Response) -> str:
    """The message of an error answer, in the one shape that OpenAI clients read."""
    return response.json()["error"]["message"]


def caller(url: str, **settings: Any) -> httpx.Client:
    """An HTTP client of a gateway that sends no key unless a call adds one.

    It opens a connection for each call, because the server closes one after an error without announcing it.
    """
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, **{"timeout": 30, "trust_env": False, "limits": limits} | settings)


def arrivals(client: httpx.Client, model: str, prompt: str = "Hello") -> list[float]:
    """When each event of a streamed answer arrived, on `time.monotonic`."""
    arrived = []
    with client.stream("POST", "/v1/chat/completions", headers=ALL_KEYS, json=chat(model, prompt, stream=True)) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                arrived.append(time.monotonic())
    return arrived


class Figure(NamedTuple):
    """One line of tests/faults.md: seconds until the caller knew, and the longest that another caller waited meanwhile."""

    fault: str
    outcome: str
    seconds: float | None
    others: float | None


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Iterator[list[Figure]]:
    """What the tests measured, written to the file of `--figures` in the end."""
    figures: list[Figure] = []
    yield figures
    if path := pytestconfig.getoption("figures"):
        rows = [
            "| fault | outcome | after, s | others waited at most, s |",
            "|---|---|---:|---:|",
            *(
                f"| {row.fault} | {row.outcome} | {'' if row.seconds is None else f'{row.seconds:.1f}'} "
                f"| {'' if row.others is None else f'{row.others:.2f}'} |"
                for row in figures
            ),
        ]
        head = "# What faults did\n\nWritten by `make faults`, one gateway worker unless said otherwise, on 2 cores.\n\n"
        path.write_text(head + "\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def vendors() -> Iterator[Vendors]:
    """The stand-in vendors."""
    with Vendors() as vendors:
        yield vendors


@pytest.fixture(scope="session")
def gateway(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway, started by `make server` in an environment with no key."""
    with Gateway(tmp_path_factory.mktemp("gateway"), **vendors.environ()) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    """A caller of the gateway."""
    with caller(gateway.url) as client:
        yield client


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what a server needs, for tests that change run.yaml."""
    return copy_project(tmp_path / "project")
