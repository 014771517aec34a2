"""The road ahead: this run.yaml on OGX, which continues llama-stack under a new name; what is better there, and what is worse.

What is worse holds the project back (deploy/README.md, "The road to OGX"): a test that fails here because OGX has cured it is good
news. `OGX=ogx make test` tries the newest release.
"""

import json
import os
import sqlite3
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import trustme
import yaml
from support.calls import ALL_KEYS, CHAT, EMBEDDINGS, HELLO, MODELS, caller, chat, events, message, responses, vendor_of
from support.exchanges import Run, exchanges
from support.gateway import PROVIDER_DATA, Gateway, clean_environ, copy_project, free_port, in_memory, wait_for
from support.services import ISSUER, Services
from support.vendors import KEYS, Vendors

# All that moving takes on the server's side: a name and the command in the start, and a name in the callers' header.
RENAMED = {
    "__main__.py": {
        '"from llama_stack.cli.llama import main; main()", "stack", "run"': '"from ogx.cli.ogx import main; main()", "run"'
    },
    "environment.py": {"LLAMA_STACK_LOG_FORMAT": "OGX_LOG_FORMAT"},
}
HEADER = "X-OGX-Provider-Data"
KEYS_FOR_OGX = {HEADER: ALL_KEYS[PROVIDER_DATA]}
PAGE = "https://chat.example.com"

# The exchanges that go otherwise on OGX 1.5.0, of all in tests/exchanges.
OTHERWISE = {
    "chat/completions": """
        a newer parameter of OpenAI's · what an answer gains · what a streamed call of a tool gains ·
        what Gemini's streamed call of a tool gains · the end of a stream · an event that is no chunk · OpenAI's error ·
        Gemini's error, a list · Claude is overloaded · an error of a stream that has not begun · a page of some proxy on the way
    """,
    "embeddings": "an error",
    "responses": """
        all parameters that chat has too · encrypted reasoning · encrypted reasoning, streamed · search on the web, streamed ·
        an earlier response, streamed · a stored prompt · a compacted history · a parameter of another API ·
        newer parameters of OpenAI's · truncation · Gemini's error, a list · a call of a tool that only extra_body has
    """,
}


def command(ogx: Path) -> tuple[str, ...]:
    """The start, by OGX's own Python."""
    return (str(ogx / "venv/bin/python"), "-I", "deploy/start")


@pytest.fixture(scope="module")
def ogx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with OGX in it, and a copy of the project that starts it: the folder of both."""
    uv, folder = os.environ.get("UV"), tmp_path_factory.mktemp("ogx")
    if not uv:
        pytest.skip("takes uv run, whose uv installs OGX beside the project")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", folder / "venv", os.environ.get("OGX", "ogx==1.5.0")]
    # Elsewhere than in the project, whose constraints are for llama-stack.
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if "Failed to fetch" in done.stderr:
        pytest.skip(f"OGX is not in uv's cache and cannot be fetched: {done.stderr}")
    assert done.returncode == 0, done.stderr
    copy_project(folder)
    for name, words in RENAMED.items():
        file = folder / "deploy/start" / name
        for old, new in words.items():
            assert old in file.read_text(), f"The start has changed: {name} no longer has {old}"
            file.write_text(file.read_text().replace(old, new))
    return folder


@pytest.fixture(scope="module")
def settings(ogx: Path) -> dict[str, str]:
    """A certificate, without which OGX does not start, and no front, behind which it would have none."""
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(ogx / "tls.pem")
    authority.cert_pem.write_to_path(ogx / "ca.pem")
    return {f"LLAMA_STACK_TLS_{half}FILE": str(ogx / "tls.pem") for half in ("CERT", "KEY")} | {"FRONT": "0"}


@pytest.fixture(scope="module")
def trust(ogx: Path, settings: dict[str, str]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(ogx / "ca.pem"))


@pytest.fixture(scope="module")
def gateway(ogx: Path, settings: dict, trust: ssl.SSLContext, vendors: Vendors, services: Services) -> Iterator[Gateway]:
    """OGX on this run.yaml, unmodified, with the settings of a team's server."""
    team = {"AUTH_JWKS_URI": f"{services.url}/jwks", "AUTH_ISSUER": ISSUER, "LLAMA_STACK_CORS_ORIGIN": PAGE}
    team["SQLITE_STORE_DIR"] = str(ogx / "store")
    gateway = Gateway(ogx / "home", command(ogx), ogx, **settings, **team, **vendors.environ())
    gateway.trust = trust
    with gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway, services: Services, trust: ssl.SSLContext) -> Iterator[httpx.Client]:
    """An HTTPS client with a token."""
    with caller(gateway.url, headers={"Authorization": f"Bearer {services.token()}"}, verify=trust) as client:
        yield client


def test_every_model_answers_and_every_key_reaches_its_own_vendor(client: httpx.Client, vendors: Vendors) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == MODELS
    for model in MODELS:
        prompt = f"from ogx to {model}"
        regular = client.post(CHAT, headers=KEYS_FOR_OGX, json=chat(model, prompt))
        assert regular.json()["choices"][0]["finish_reason"] == "stop"
        stream = client.post(CHAT, headers=KEYS_FOR_OGX, json=chat(model, prompt, stream=True))
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "stop"
        arrived = vendors.seen_with(prompt)
        assert [(seen.vendor, seen.key) for seen in arrived] == [(vendor_of(model), f"Bearer {KEYS[vendor_of(model)]}")] * 2
    for model in EMBEDDINGS:
        answer = client.post("/v1/embeddings", headers=KEYS_FOR_OGX, json={"model": model, "input": ["a", "b"]}).json()
        assert [item["index"] for item in answer["data"]] == [0, 1], answer


def test_asks_for_the_same_tokens(client: httpx.Client, services: Services) -> None:
    for bad in ("", f"Bearer {services.token(exp=1)}", f"Bearer {services.token(aud='another-service')}"):
        assert client.get("/v1/models", headers={"Authorization": bad}).status_code == 401
    assert client.get("/v1/health", headers={"Authorization": ""}).is_success


def test_keeps_nothing_and_refuses_the_same_routes(client: httpx.Client, gateway: Gateway, ogx: Path) -> None:
    client.post(CHAT, headers=KEYS_FOR_OGX, json=chat(MODELS[0], "nobody keeps this"))
    for stream in (False, True):
        client.post("/v1/responses", headers=KEYS_FOR_OGX, json=responses(MODELS[0], "nobody keeps this", stream=stream))
    assert client.get(CHAT).json().get("data", []) == client.get("/v1/responses").json()["data"] == []
    for path in ("/v1/prompts", "/v1/conversations", "/v1/providers"):
        assert client.get(path).status_code == 403
    kept = b"".join(file.read_bytes() for folder in (gateway.home, ogx / "store") for file in folder.rglob("*") if file.is_file())
    for secret in (*KEYS.values(), "nobody keeps this"):
        assert secret.encode() not in kept


def test_a_stream_whose_caller_hangs_up_ends_at_the_vendor(client: httpx.Client, vendors: Vendors) -> None:
    """Which is better than llama-stack 0.7.3."""
    before = vendors.streaming
    with client.stream("POST", CHAT, headers=KEYS_FOR_OGX, json=chat("openai/every-0.2", stream=True)) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert vendors.streaming == before + 1
    wait_for(lambda: vendors.streaming == before, 2)


# What is worse


def test_what_goes_otherwise_of_all_exchanges(client: httpx.Client, vendors: Vendors) -> None:
    known = {(path, " ".join(name.split())) for path, names in OTHERWISE.items() for name in names.split("·")}
    runs = [Run(each, client, vendors, f"ogx-{i}", KEYS_FOR_OGX) for i, each in enumerate(exchanges())]
    assert {(run.exchange.to, run.exchange.name) for run in runs if run.differs()} == known


def test_three_things_are_lost(client: httpx.Client) -> None:
    """The old header's name, CORS, and what Gemini says of an error."""
    assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0])).status_code == 500
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options(CHAT, headers=asked).headers
    answer = client.post(CHAT, headers=KEYS_FOR_OGX, json=chat("gemini/status-429"))
    assert (answer.status_code, message(answer)) == (429, "Error code: 429")


def test_extra_body_takes_one_level_more_in_responses(client: httpx.Client, vendors: Vendors) -> None:
    for extra, status in (({"top_k": 3}, 500), ({"extra_body": {"top_k": 3}}, 200)):
        answer = client.post("/v1/responses", headers=KEYS_FOR_OGX, json=responses(MODELS[0], extra_body=extra))
        assert answer.status_code == status, answer.text
    assert vendors.seen[-1].json["top_k"] == 3


def test_a_table_has_lost_its_trigger(gateway: Gateway, ogx: Path) -> None:
    """It renames conversation_items, trigger and all, and makes a new one that keeps what is inserted, beside others."""
    database = sqlite3.connect(ogx / "store/keeps-nothing.db")
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    guarded = {table for (table,) in database.execute("SELECT tbl_name FROM sqlite_master WHERE type = 'trigger'")}
    assert {"conversation_items", "prompts", "jobs", "memory_records"} <= tables - guarded
    assert "conversation_items_v1" in guarded


def test_its_own_providers_alone_have_messages_and_they_keep_every_key(
    ogx: Path, settings: dict, trust: ssl.SSLContext, vendors: Vendors, tmp_path: Path
) -> None:
    """And a descriptor for each, as long as the server lives. `remote::passthrough` lets go of most."""
    config = yaml.safe_load((ogx / "run.yaml").read_text())
    config["apis"].append("messages")
    store = {"kvstore": {"namespace": "messages", "backend": "kv_default"}}
    config["providers"]["messages"] = [{"provider_id": "builtin", "provider_type": "inline::builtin", "config": store}]
    config["server"]["auth"]["route_policy"][0]["permit"]["paths"].append("/v1/messages")
    folder = copy_project(tmp_path / "project")
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    for name in RENAMED:
        (folder / "deploy/start" / name).write_text((ogx / "deploy/start" / name).read_text())
    store = {"SQLITE_STORE_DIR": str(tmp_path / "store")}
    gateway = Gateway(tmp_path / "home", command(ogx), folder, **settings, **store, **vendors.environ())
    gateway.trust = trust
    with gateway, caller(gateway.url, verify=trust) as client:
        call = {"max_tokens": 10, "messages": HELLO}
        assert client.post("/v1/messages", headers=KEYS_FOR_OGX, json=call | {"model": MODELS[4]}).status_code == 501
        answer = client.post("/v1/messages", headers=KEYS_FOR_OGX, json=call | {"model": "gemini-native/any"})
        assert answer.json()["content"][0]["text"].endswith("You said: Hello")

        marker, server = uuid.uuid4().hex, psutil.Process(gateway.server)
        before = server.num_fds()
        for number in range(50):
            header = {HEADER: json.dumps({"gemini_api_key": f"{KEYS['gemini']}-{marker}-{number}"})}
            client.post("/v1/embeddings", headers=header, json={"model": EMBEDDINGS[1], "input": "a"}).raise_for_status()
        for number in range(50):  # Others call, so that what was free is used again.
            client.post(CHAT, headers=KEYS_FOR_OGX, json=chat(MODELS[0], f"other {number}"))
        assert len(in_memory(server.pid, marker.encode() + rb"-\d+")) == 50
        assert server.num_fds() - before > 25


def test_a_wrong_run_yaml_hangs(ogx: Path, vendors: Vendors, tmp_path: Path) -> None:
    """It says that its start has failed, and stays."""
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ogx / "run.yaml").read_text().replace("remote::passthrough", "remote::nonsense"))
    environ = clean_environ(tmp_path, OGX_LOG_FORMAT="json", SQLITE_STORE_DIR=str(tmp_path), **vendors.environ())
    run = [ogx / "venv/bin/ogx", "run", wrong, "--insecure", "--port", str(free_port())]
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(run, env=environ, stdout=log, stderr=log) as process:
        try:
            said = (tmp_path / "log").read_text
            wait_for(lambda: "Application startup failed. Exiting." in said(), seen=said)
            time.sleep(2)
            assert process.poll() is None
        finally:
            process.kill()


def test_asks_for_tls_and_takes_over_the_home_of_llama_stack(ogx: Path, vendors: Vendors, tmp_path: Path) -> None:
    """Without a certificate it wants to be told `--insecure`. It moves ~/.llama, so the store has to be elsewhere."""
    with pytest.raises(RuntimeError, match="did not start"):
        Gateway(tmp_path, command(ogx), ogx, FRONT="0", **vendors.environ()).start()
    assert not (tmp_path / ".llama").exists()
    assert (tmp_path / ".ogx/distributions/lls-openai/keeps-nothing.db").exists()


def test_comes_without_uvloop(ogx: Path) -> None:
    """So `uvicorn[standard]` is still wanted."""
    assert not [*(ogx / "venv/lib").glob("python3*/site-packages/uvloop")]
