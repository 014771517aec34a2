"""What run.yaml promises, asked of the running server: the settings, the paths, and that nothing else is open."""

import contextlib
import json
import re
import sqlite3
import time
from pathlib import Path

import httpx
from support.calls import ALL_KEYS, MODELS, RUN_YAML, caller, chat, one_key
from support.gateway import BY_HAND, PROJECT, PROVIDER_DATA, Gateway, family
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


def test_exactly_the_permitted_paths_are_open(client: httpx.Client) -> None:
    """Every path that the server describes, with every verb: what is not permitted is refused before anything else is asked."""
    described = client.get("/openapi.json").json()["paths"]
    assert PERMITTED.keys() < described.keys()
    answers = {
        path: {verb: client.request(verb, re.sub(r"\{.*?\}", "x", path), json={}).status_code for verb in VERBS}
        for path in described
    }
    for path, of_verb in answers.items():
        if path not in PERMITTED:
            assert set(of_verb.values()) == {403}, f"{path} answers {of_verb}"
    served = {path: {verb for verb in VERBS if answers[path][verb] not in (403, 405)} for path in PERMITTED}
    assert served == PERMITTED


# As users and other programs know them.
DEFAULTS = {
    "OPENAI_PASSTHROUGH_URL": "https://api.openai.com",
    "GEMINI_PASSTHROUGH_URL": "https://generativelanguage.googleapis.com/v1beta/openai",
    "ANTHROPIC_PASSTHROUGH_URL": "https://api.anthropic.com",
    "SQLITE_STORE_DIR": "~/.llama/distributions/lls-openai",
    "LLAMA_STACK_HOST": "127.0.0.1",
    "LLAMA_STACK_PORT": "8321",
    "LLAMA_STACK_WORKERS": "1",
    "LLAMA_STACK_TLS_CERTFILE": "",
    "LLAMA_STACK_TLS_KEYFILE": "",
    "LLAMA_STACK_CORS_ORIGIN": "none",
    "AUTH_ISSUER": "",
    "AUTH_AUDIENCE": "lls-openai",
}


def test_every_setting_has_the_default_that_users_know() -> None:
    found = re.findall(r"\$\{env\.(\w+):=([^}]*)\}", (PROJECT / "run.yaml").read_text())
    assert dict(found) == DEFAULTS
    assert set(found) == set(DEFAULTS.items()), "A setting that is read in two places has one default."


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


def test_the_store_is_in_the_distributions_folder(gateway: Gateway) -> None:
    (store,) = gateway.home.rglob("keeps-nothing.db")
    assert store.parent == gateway.home / ".llama" / "distributions" / RUN_YAML["distro_name"]


def test_started_by_hand_in_a_folder_that_exists_it_keeps_nothing(vendors: Vendors, tmp_path: Path) -> None:
    """Without deploy/serve.sh there is no database that keeps nothing, and the server must not make one that keeps all."""
    store = tmp_path / "store"
    store.mkdir()
    settings = {"SQLITE_STORE_DIR": str(store), "LLAMA_STACK_LOG_FORMAT": "json"}
    with Gateway(tmp_path, BY_HAND, **settings, **vendors.environ()) as gateway, caller(gateway.url) as client:
        for header in (ALL_KEYS, one_key(MODELS[0])):
            # The server makes its tables at the first use, and inserts chats after it has answered.
            client.get("/v1/responses")
            for _ in range(5):
                assert client.post("/v1/chat/completions", headers=header, json=chat(MODELS[0], "between us")).is_success
                client.post("/v1/responses", headers=header, json={"model": MODELS[0], "input": "between us"})
            time.sleep(1)
        for path in ("/v1/chat/completions", "/v1/responses"):
            assert "between us" not in client.get(path).text
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"between us" in path.read_bytes()]


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


def test_a_llama_stack_client_of_any_release_is_let_in(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"X-LlamaStack-Client-Version": "0.1.0"}).is_success


def tables(database: sqlite3.Connection) -> list[str]:
    """The names of a database's tables."""
    return [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]


def test_every_table_drops_what_is_inserted() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript((PROJECT / "deploy/keeps-nothing.sql").read_text())
        assert tables(database)
        for table in tables(database):
            names = [column[1] for column in database.execute(f"PRAGMA table_info({table})")]
            insert = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('1' for _ in names)})"
            for statement in (insert, f"{insert} ON CONFLICT ({names[0]}) DO UPDATE SET {names[1]} = 2"):
                database.execute(statement)
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_the_server_has_no_other_table_than_those_that_drop(client: httpx.Client, gateway: Gateway) -> None:
    assert client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0])).is_success
    assert client.post("/v1/responses", headers=ALL_KEYS, json={"model": MODELS[0], "input": "Hello"}).is_success
    file = [{"role": "user", "content": [{"type": "input_file", "file_id": "file-made-up"}]}]
    assert client.post("/v1/responses", headers=ALL_KEYS, json={"model": MODELS[0], "input": file}).is_error
    (path,) = gateway.home.rglob("keeps-nothing.db")
    with contextlib.closing(sqlite3.connect(":memory:")) as ours, contextlib.closing(sqlite3.connect(path)) as theirs:
        ours.executescript((PROJECT / "deploy/keeps-nothing.sql").read_text())
        assert tables(theirs) == tables(ours)
