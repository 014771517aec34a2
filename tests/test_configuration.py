"""What run.yaml promises, asked of the running server: the settings, the paths, and that nothing else is open."""

import json
import re
from pathlib import Path

import httpx
from support.calls import ALL_KEYS, MODELS, RUN_YAML, caller, chat
from support.gateway import PROVIDER_DATA, Gateway, family
from support.vendors import KEYS, Vendors

PERMITTED = {
    "/v1/models": {"GET"},
    "/v1/models/{model_id}": {"GET"},
    "/v1/chat/completions": {"GET", "POST"},
    "/v1/responses": {"GET", "POST"},
    "/v1/embeddings": {"POST"},
    "/v1/health": {"GET"},
    "/v1/version": {"GET"},
}
VERBS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def test_exactly_the_permitted_paths_are_open(server: httpx.Client) -> None:
    """Every path that the server describes, with every verb: what is not permitted is refused before anything else is asked."""
    described = server.get("/openapi.json").json()["paths"]
    assert PERMITTED.keys() < described.keys()
    answers = {
        path: {verb: server.request(verb, re.sub(r"\{.*?\}", "x", path), json={}).status_code for verb in VERBS}
        for path in described
    }
    for path, of_verb in answers.items():
        if path not in PERMITTED:
            assert set(of_verb.values()) == {403}, f"{path} answers {of_verb}"
    served = {path: {verb for verb in VERBS if answers[path][verb] not in (403, 405)} for path in PERMITTED}
    assert served == PERMITTED


def test_its_name_is_the_one_that_users_know() -> None:
    """test_documents.py compares the defaults in run.yaml with those that the documents give."""
    assert RUN_YAML["distro_name"] == "lls-openai"


def test_every_vendors_url_can_be_replaced(vendors: Vendors, tmp_path: Path) -> None:
    moved = {"openai": "anthropic", "gemini": "openai", "anthropic": "openai"}
    urls = {"anthropic": "https://api.anthropic.com", "openai": "https://api.openai.com"}
    settings = {f"{name.upper()}_PASSTHROUGH_URL": urls[to] for name, to in moved.items()}
    with Gateway(tmp_path, **settings, **vendors.environ()) as gateway, caller(gateway.url) as client:
        for name, to in moved.items():
            header = {PROVIDER_DATA: json.dumps({f"{name}_authorization": f"Bearer {KEYS[to]}"})}
            body = chat(f"{name}/any", f"{name} has moved")
            assert client.post("/v1/chat/completions", headers=header, json=body).is_success
            assert {request.vendor for request in vendors.seen_with(f"{name} has moved")} == {to}


def test_one_worker_unless_told(gateway: Gateway) -> None:
    assert not gateway.workers


def test_it_writes_to_its_own_folder_alone(client: httpx.Client, gateway: Gateway) -> None:
    assert client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0])).is_success
    written = {
        Path(file.path)
        for process in family(gateway.process.pid)
        for file in process.open_files()
        if file.mode != "r" and not file.path.endswith("(deleted)")
    }
    assert gateway.log_file in written
    assert [path for path in written if not path.is_relative_to(gateway.home)] == []
