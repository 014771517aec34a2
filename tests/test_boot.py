"""The server starts from run.yaml alone: without a key, without a network, and without a memory of earlier runs."""

import time
from pathlib import Path

import httpx
import yaml
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat, message, one_key, responses
from support.gateway import BY_HAND, NOWHERE, START, Gateway, listening
from support.vendors import Vendors


def models(gateway: Gateway) -> dict[str, str]:
    """The listed models and their display names."""
    listed = httpx.get(f"{gateway.url}/v1/models", trust_env=False, timeout=60).json()["data"]
    return {model["id"]: model["custom_metadata"].get("display_name") for model in listed}


def call(gateway: Gateway, model: str = MODELS[0]) -> httpx.Response:
    """One chat call with every key."""
    return httpx.post(f"{gateway.url}/v1/chat/completions", headers=ALL_KEYS, json=chat(model), timeout=30, trust_env=False)


def test_boots_without_a_key_and_without_a_network_and_reflects_run_yaml_alone(
    project: Path, tmp_path: Path, vendors: Vendors
) -> None:
    """Nothing of an earlier boot, nor of scripts in the same folder that have names of the server's modules."""
    for name in ("openai.py", "code.py"):
        (project / name).write_text("not a module of the server's")
    start = {"home": tmp_path / "home", "command": START, "cwd": project}
    with Gateway(**start, **NOWHERE) as gateway:
        assert list(models(gateway)) == MODELS
        assert call(gateway).status_code == 500

    file = project / "run.yaml"
    config = yaml.safe_load(file.read_text())
    registered = config["registered_resources"]["models"]
    registered.pop()
    registered[0]["metadata"]["display_name"] = "Changed"
    registered.append({"model_id": "anthropic/added", "provider_id": "anthropic", "provider_model_id": "added"})
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    with Gateway(**start, **vendors.environ()) as gateway:
        assert models(gateway)["openai/gpt-4o"] == "Changed"
        assert list(models(gateway)) == [*MODELS[:-1], "anthropic/added"]
        assert call(gateway, "anthropic/added").is_success


def test_a_certificate_that_is_not_trusted_is_refused(vendors: Vendors, tmp_path: Path) -> None:
    """The system's CAs know nothing of the stand-ins' certificate, so no call, and no key, may reach them."""
    vendors.seen.clear()
    with Gateway(tmp_path, HTTPS_PROXY=vendors.environ()["HTTPS_PROXY"]) as gateway:
        assert call(gateway).status_code == 500
        assert call(gateway, "gemini-native/gemini-2.5-flash").status_code == 500
    assert not vendors.seen


def test_started_by_hand_it_serves_the_same_and_keeps_nothing_either(vendors: Vendors, tmp_path: Path) -> None:
    """In a folder that exists: there is no database that keeps nothing, and the server must not make one that keeps all."""
    store = tmp_path / ".llama" / "distributions" / "lls-openai"
    store.mkdir(parents=True)
    settings = {"LLAMA_STACK_LOG_FORMAT": "json", "LLAMA_STACK_LOGGING": "all=debug"} | vendors.environ()
    with Gateway(tmp_path, BY_HAND, **settings) as gateway, caller(gateway.url) as client:
        assert list(models(gateway)) == MODELS
        for header in (ALL_KEYS, one_key(MODELS[0])):
            client.get("/v1/responses")  # The server makes its tables at the first use.
            for _ in range(5):
                assert client.post(CHAT, headers=header, json=chat(MODELS[0], "between us")).is_success
                client.post("/v1/responses", headers=header, json=responses(MODELS[0], "between us"))
        time.sleep(1)  # It inserts chats after it has answered.
        for path in (CHAT, "/v1/responses"):
            assert "between us" not in client.get(path).text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"between us" in path.read_bytes()]


def test_listens_on_loopback_only(gateway: Gateway) -> None:
    assert listening(gateway.port) == ["127.0.0.1"]


def test_an_error_is_in_the_shape_that_openai_clients_read(gateway: Gateway) -> None:
    answer = httpx.get(f"{gateway.url}/v1/prompts", trust_env=False, timeout=60)
    assert "Access denied" in message(answer)
