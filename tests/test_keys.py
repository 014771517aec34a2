"""A key reaches its own vendor alone, and nothing that a caller sends is kept."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from support.calls import (
    ALL_KEYS,
    CHAT,
    EMBEDDINGS,
    MALFORMED,
    MODELS,
    SECRET,
    WRONG_KEY,
    chat,
    events,
    message,
    one_key,
    vendor_of,
)
from support.gateway import PROVIDER_DATA, Gateway, processes, wait_for
from support.vendors import KEYS, Vendors


def keys_seen(vendors: Vendors) -> dict[str, set[str]]:
    """The keys that each vendor has been sent, the names of other vendors' keys in any header or body included."""
    found: dict[str, set[str]] = {name: set() for name in KEYS}
    for request in list(vendors.seen):
        text = json.dumps(request.headers) + request.body.decode(errors="replace")
        found[request.vendor] |= {key for key in KEYS.values() if key in text}
    return found


def test_each_vendor_sees_its_own_key_alone_on_chat(client: httpx.Client, vendors: Vendors) -> None:
    """And nobody else is called."""
    vendors.strangers.clear()
    for stream in (False, True):
        vendors.seen.clear()
        for model in MODELS:
            assert client.post(CHAT, headers=ALL_KEYS, json=chat(model, stream=stream)).is_success
        assert keys_seen(vendors) == {name: {key} for name, key in KEYS.items()}
        for request in vendors.seen:
            assert request.key == f"Bearer {KEYS[request.vendor]}"
            assert "x-llamastack-provider-data" not in request.headers
    assert vendors.strangers == []


def test_each_vendor_sees_its_own_key_alone_on_embeddings(client: httpx.Client, vendors: Vendors) -> None:
    vendors.seen.clear()
    for model in EMBEDDINGS:
        assert client.post("/v1/embeddings", headers=ALL_KEYS, json={"model": model, "input": "a"}).is_success
    assert keys_seen(vendors) == {"openai": {KEYS["openai"]}, "gemini": {KEYS["gemini"]}, "anthropic": set()}


def test_each_vendor_sees_its_own_key_alone_on_listing(client: httpx.Client, vendors: Vendors) -> None:
    vendors.seen.clear()
    listed = [model["id"] for model in client.get("/v1/models", headers=ALL_KEYS).json()["data"]]
    assert listed[:5] == MODELS
    assert "anthropic/anthropic-other" in listed  # With keys, the vendors' own models are listed as well.
    assert keys_seen(vendors) == {name: {key} for name, key in KEYS.items()}


def test_listing_with_the_one_key_form_hands_it_to_every_vendor(server: httpx.Client, vendors: Vendors) -> None:
    """The README warns of this, where there is no front. If it stops being so, the warning can go."""
    vendors.seen.clear()
    server.get("/v1/models", headers=one_key("openai/gpt-4o"))
    assert all(KEYS["openai"] in keys for keys in keys_seen(vendors).values())


def test_callers_at_the_same_time_keep_their_keys_apart(client: httpx.Client, vendors: Vendors) -> None:
    def call(number: int) -> None:
        model = MODELS[number % len(MODELS)]
        data = {f"{vendor_of(model)}_authorization": f"Bearer {KEYS[vendor_of(model)]}-caller-{number}-end"}
        body = chat(model, f"I am caller-{number}-end")
        client.post(CHAT, headers={PROVIDER_DATA: json.dumps(data)}, json=body).raise_for_status()

    with ThreadPoolExecutor(40) as callers:
        list(callers.map(call, range(40)))
    for number in range(40):
        (request,) = vendors.seen_with(f"I am caller-{number}-end")
        assert request.key.endswith(f"-caller-{number}-end")


def test_nobody_can_read_a_chat_afterwards(client: httpx.Client) -> None:
    answer = client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0], "between us")).json()
    client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0], "between us", stream=True))
    time.sleep(1)  # The server inserts after it has answered.
    listed = client.get(CHAT)
    assert listed.status_code == 400
    assert "chats are not kept" in message(listed)
    assert client.get(f"/v1/chat/completions/{answer['id']}").status_code == 403


def test_what_the_gateway_does_not_exist_for_is_refused(server: httpx.Client) -> None:
    """By the server itself, before it asks anything else."""
    for path in (
        "/v1/prompts",
        "/v1/conversations",
        "/v1/conversations/conv_1/items",
        "/v1beta/connectors",
        "/v1alpha/admin/providers",
        "/v1/providers",
        "/v1/inspect/routes",
        "/v1/prompts/",
        "//v1/prompts",
        "/v1/models/../prompts",
        "/",
    ):
        for method in ("GET", "POST", "DELETE"):
            assert server.request(method, path).status_code == 403, (method, path)


def test_health_and_version_are_open(client: httpx.Client, server: httpx.Client) -> None:
    """The server's own documentation too, which the front closes."""
    for path in ("/v1/health", "/v1/version"):
        assert client.get(path).is_success
    for path in ("/docs", "/openapi.json"):
        assert server.get(path).is_success


def see_in_log(client: httpx.Client, gateway: Gateway, name: str) -> int:
    """Make a call that the log names, and wait for its line: all that was logged before is there then. Returns its number."""
    path = f"/v1/models/{name.replace(' ', '-')}"
    client.get(path)
    wait_for(lambda: path in gateway.log)
    return next(number for number, line in enumerate(gateway.log.splitlines(), 1) if path in line)


def test_nothing_of_a_call_is_left_in_files_logs_or_arguments(client: httpx.Client, gateway: Gateway) -> None:
    """Calls that succeed, that fail at the vendor, and that are malformed in every way that makes the server complain."""
    for model in [*MODELS, "openai/status-401", "gemini/status-429", "anthropic/hang-up", "openai/no-such-model"]:
        for stream in (False, True):
            client.post(CHAT, headers=ALL_KEYS, json=chat(model, SECRET, stream=stream))
    for call in MALFORMED:
        client.post(CHAT, **call)
    see_in_log(client, gateway, "everything was sent")
    files = [path for path in gateway.home.rglob("*") if path.is_file()]
    assert gateway.log_file in files
    assert any(path.name == "keeps-nothing.db" for path in files)
    for path in files:
        content = path.read_bytes()
        assert b"sk-fake" not in content, f"{path.name} holds what a caller sent"
        assert b"stand-in for" not in content, f"{path.name} holds what a vendor answered"
    assert "sk-fake" not in "".join(" ".join(line) for line in processes(gateway.process.pid))


def test_memory_does_not_grow_with_what_is_sent(client: httpx.Client, gateway: Gateway) -> None:
    """30 MB of prompts: a server that kept them would grow by at least as much."""

    def send(count: int) -> None:
        for _ in range(count):
            client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0], "word " * 20_000)).raise_for_status()

    send(100)
    before = gateway.resident()
    send(300)
    assert gateway.resident() - before < 20_000_000


def test_wrong_keys_do_not_hold_up_good_calls(client: httpx.Client, vendors: Vendors) -> None:
    """With console logs, each wrong key takes the server 4 s in which nobody is served."""
    done = threading.Event()

    def storm(_: int) -> set[int]:
        """The statuses of the answers to wrong keys."""
        answers = set()
        while not done.is_set():
            answers.add(client.post(CHAT, headers=WRONG_KEY, json=chat(MODELS[0])).status_code)
        return answers

    with ThreadPoolExecutor(8) as stormers:
        answers = stormers.map(storm, range(8))
        try:
            for _ in range(10):
                response = client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0], stream=True), timeout=10)
                assert events(response)[-1]["choices"][0]["finish_reason"] == "stop"
        finally:
            done.set()
        assert set().union(*answers) == {401}
