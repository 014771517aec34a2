"""The server starts from run.yaml alone: without a key, without a network, and without a memory of earlier runs."""

import json
import sqlite3
import time
from pathlib import Path

import httpx
import pytest
import yaml
from support.calls import ALL_KEYS, MODELS, caller, chat, message
from support.gateway import BY_HAND, PROVIDER_DATA, START, Gateway, listening, processes
from support.vendors import KEYS, Vendors

CA_FOLDERS = [Path("/etc/ssl/certs"), Path("/etc/pki/ca-trust/extracted/pem/directory-hash")]
NOWHERE = {"HTTPS_PROXY": "http://127.0.0.1:9"}  # The discard port: no vendor can be reached.


def models(gateway: Gateway) -> dict[str, str]:
    """The listed models and their display names."""
    listed = httpx.get(f"{gateway.url}/v1/models", trust_env=False, timeout=60).json()["data"]
    return {model["id"]: model["custom_metadata"].get("display_name") for model in listed}


def call(gateway: Gateway, model: str = MODELS[0]) -> httpx.Response:
    """One chat call with every key."""
    return httpx.post(f"{gateway.url}/v1/chat/completions", headers=ALL_KEYS, json=chat(model), timeout=30, trust_env=False)


def edit(project: Path, change) -> None:
    """Load run.yaml, let `change` alter it, and write it back."""
    config = yaml.safe_load((project / "run.yaml").read_text())
    change(config)
    (project / "run.yaml").write_text(yaml.safe_dump(config))


def test_boots_without_a_key_and_without_a_network(tmp_path: Path) -> None:
    with Gateway(tmp_path, **NOWHERE) as gateway:
        assert list(models(gateway)) == MODELS
        assert call(gateway).status_code == 500


def test_every_boot_reflects_run_yaml_alone(project: Path, tmp_path: Path, vendors: Vendors) -> None:
    """Scripts of the user's in the same folder are not taken for modules of the same name."""
    for name in ("openai.py", "code.py"):
        (project / name).write_text("not a module of the server's")
    settings = {"home": tmp_path / "home", "command": START, "cwd": project} | vendors.environ()
    with Gateway(**settings) as gateway:
        assert list(models(gateway)) == MODELS

    def change(config: dict) -> None:
        registered = config["registered_resources"]["models"]
        registered.pop()
        registered[0]["metadata"]["display_name"] = "Changed"
        registered.append({"model_id": "anthropic/added", "provider_id": "anthropic", "provider_model_id": "added"})

    edit(project, change)
    with Gateway(**settings) as gateway:
        assert models(gateway)["openai/gpt-4o"] == "Changed"
        assert list(models(gateway)) == [*MODELS[:-1], "anthropic/added"]
        assert call(gateway, "anthropic/added").is_success


def test_a_certificate_that_is_not_trusted_is_refused(vendors: Vendors, tmp_path: Path) -> None:
    """The system's CAs know nothing of the stand-ins' certificate, so no call, and no key, may reach them."""
    vendors.seen.clear()
    with Gateway(tmp_path, HTTPS_PROXY=vendors.environ()["HTTPS_PROXY"]) as gateway:
        assert call(gateway).status_code == 500
        assert call(gateway, "gemini-native/gemini-2.5-flash").status_code == 500
        hashed = [str(folder) for folder in CA_FOLDERS if any(folder.glob("*.0"))]
        assert gateway.environ.get("SSL_CERT_DIR") == (hashed[0] if hashed else None)
        assert gateway.environ["LLAMA_STACK_LOG_FORMAT"] == "json"
    assert not vendors.seen


def test_started_by_hand_it_serves_the_same_and_keeps_nothing_either(vendors: Vendors, tmp_path: Path) -> None:
    with Gateway(tmp_path, ("uv", "run", *BY_HAND), LLAMA_STACK_LOGGING="all=debug", **vendors.environ()) as gateway:
        assert list(models(gateway)) == MODELS
        for _ in range(10):
            assert call(gateway).is_success
        time.sleep(1)
        assert not any(b"Hello" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        listed = httpx.get(f"{gateway.url}/v1/chat/completions", timeout=30, trust_env=False)
        assert "Hello" not in listed.text


def test_listens_on_loopback_only(gateway: Gateway) -> None:
    assert listening(gateway.port) == ["127.0.0.1"]


def test_the_settings_are_respected(vendors: Vendors, tmp_path: Path) -> None:
    """Host, port, two workers, a store with a space in its name, and a vendor's URL replaced by another's."""
    settings = {
        "LLAMA_STACK_HOST": "0.0.0.0",
        "LLAMA_STACK_WORKERS": "2",
        "SQLITE_STORE_DIR": str(tmp_path / "a store"),
        "OPENAI_PASSTHROUGH_URL": "https://api.anthropic.com",
    }
    with Gateway(tmp_path, **settings, **vendors.environ()) as gateway:
        assert len(gateway.workers) == 2
        assert "0.0.0.0" in listening(gateway.port)
        assert call(gateway, "anthropic/any").is_success
        redirected = {PROVIDER_DATA: json.dumps({"openai_authorization": f"Bearer {KEYS['anthropic']}"})}
        url = f"{gateway.url}/v1/chat/completions"
        answer = httpx.post(url, headers=redirected, json=chat(MODELS[0]), timeout=30, trust_env=False)
        assert "stand-in for Anthropic" in answer.text
    store = sqlite3.connect(tmp_path / "a store" / "keeps-nothing.db")
    assert store.execute("SELECT count(*) FROM responses").fetchone() == (0,)
    assert list(tmp_path.rglob(".llama")) == []


def test_the_users_own_certificates_stay(tmp_path: Path) -> None:
    own = tmp_path / "no-certificates"
    own.mkdir()
    assert Gateway(tmp_path, START, EGRESS="0", SSL_CERT_DIR=str(own)).environ_at_start()["SSL_CERT_DIR"] == str(own)


def test_stops_at_once_when_idle_and_tells_so(vendors: Vendors, tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, START, **vendors.environ()).start()
    assert gateway.stop(60) in (0, -15, 143)
    assert not gateway.answers()
    assert processes(gateway.process.pid) == []


def test_works_for_a_second_gateway_with_the_same_store(gateway: Gateway, vendors: Vendors) -> None:
    with Gateway(gateway.home, **vendors.environ()) as second:
        assert call(second).is_success
        assert call(gateway).is_success


@pytest.mark.parametrize("workers", ["1", "2"])
def test_streams_in_flight_finish_when_it_is_told_to_stop(vendors: Vendors, tmp_path: Path, workers: str) -> None:
    body = chat("openai/slow", stream=True)
    with (
        Gateway(tmp_path, START, LLAMA_STACK_WORKERS=workers, **vendors.environ()) as gateway,
        caller(gateway.url) as client,
        client.stream("POST", "/v1/chat/completions", headers=ALL_KEYS, json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        gateway.process.terminate()
        rest = list(lines)
    assert any('"finish_reason":"stop"' in line for line in rest)


def test_an_error_is_in_the_shape_that_openai_clients_read(gateway: Gateway) -> None:
    answer = httpx.get(f"{gateway.url}/v1/prompts", trust_env=False, timeout=60)
    assert "Access denied" in message(answer)
