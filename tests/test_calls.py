"""Every call that users send gets the vendor's answer, or the vendor's error."""

import itertools

import httpx
import pytest
from support.calls import (
    ALL_KEYS,
    CHAT,
    EMBEDDINGS,
    MODELS,
    RUN_YAML,
    arrivals,
    chat,
    events,
    finished,
    message,
    one_key,
    streamed_text,
    vendor_of,
)
from support.gateway import PROVIDER_DATA
from support.vendors import KEYS, VENDORS, Vendor, Vendors

EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
EVERY_VENDOR = pytest.mark.parametrize("vendor", VENDORS.values(), ids=KEYS)


def test_lists_exactly_the_five_models_with_their_display_names(client: httpx.Client) -> None:
    listed = {model["id"]: model["custom_metadata"]["display_name"] for model in client.get("/v1/models").json()["data"]}
    assert listed == {
        "openai/gpt-4o": "GPT-4o",
        "openai-mini/gpt-4o-mini": "GPT-4o Mini",
        "openai-mini/gpt-4.1-nano": "GPT-4.1 Nano",
        "gemini/gemini-2.5-flash-lite": "Gemini 2.5 Flash Lite",
        "anthropic/claude-haiku-4-5-20251001": "Claude Haiku 4.5",
    }, "the gateway lists other models than here: if run.yaml is meant, change this list"


def test_every_registered_model_is_named_as_callers_name_it() -> None:
    for model in RUN_YAML["registered_resources"]["models"]:
        assert model["model_id"] == f"{model['provider_id']}/{model['provider_model_id']}"


def test_tells_about_one_model(client: httpx.Client) -> None:
    assert client.get(f"/v1/models/{MODELS[0]}").json()["identifier"] == MODELS[0]


@EVERY_MODEL
def test_regular_call(client: httpx.Client, vendors: Vendors, model: str) -> None:
    """By both forms of the header, of which the older one has a URL that is ignored."""
    for headers in (ALL_KEYS, one_key(model)):
        response = client.post(CHAT, headers=headers, json=chat(model, f"regular {model}"))
        assert response.is_success, response.text
        answer = response.json()
        assert answer["choices"][0]["message"]["content"].endswith(f"You said: regular {model}")
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["total_tokens"] > 0
        arrived = vendors.seen_with(f"regular {model}")[-1]
        assert (arrived.vendor, arrived.json["model"]) == (vendor_of(model), model.partition("/")[2])


@EVERY_MODEL
def test_streaming_call(client: httpx.Client, model: str) -> None:
    for headers in (ALL_KEYS, one_key(model)):
        response = client.post(CHAT, headers=headers, json=chat(model, f"stream {model}", stream=True))
        assert response.headers["content-type"].startswith("text/event-stream")
        assert streamed_text(response).endswith(f"You said: stream {model}")
        assert len(events(response)) > 5
        assert events(response)[-1]["choices"][0]["finish_reason"] == "stop"
        assert not any(event.get("usage") for event in events(response))
    body = chat(model, stream=True, stream_options={"include_usage": True})
    last = events(client.post(CHAT, headers=ALL_KEYS, json=body))[-1]
    assert bool(last["choices"]) == model.startswith("gemini")  # Which has no chunk for the usage alone.
    assert last["usage"]["total_tokens"] > 0


def test_tokens_arrive_as_the_vendor_sends_them(client: httpx.Client) -> None:
    """From a stand-in that takes 0.3 s a word, the words come one by one and not all at the end."""
    arrived = arrivals(client, "openai/slow")
    assert len(arrived) > 10
    assert arrived[-1] - arrived[0] > 2


@pytest.mark.parametrize("model", EMBEDDINGS)
def test_embeddings(client: httpx.Client, model: str) -> None:
    """The native provider takes its key as gemini_api_key; the older form is for passthrough."""
    for headers in [ALL_KEYS] if model.startswith("gemini-native") else [ALL_KEYS, one_key(model)]:
        answer = client.post("/v1/embeddings", headers=headers, json={"model": model, "input": ["a text", "another"]}).json()
        assert [item["index"] for item in answer["data"]] == [0, 1]
        assert answer["data"][0]["embedding"] != answer["data"][1]["embedding"]
        # Gemini does not say how many, and the native provider reports none.
        assert answer["usage"]["total_tokens"] == (0 if model.startswith("gemini") else 2)


def test_a_model_that_is_not_registered_works_by_its_vendor_id(client: httpx.Client) -> None:
    for provider in ("openai", "openai-mini", "gemini", "anthropic"):
        response = client.post(CHAT, headers=ALL_KEYS, json=chat(f"{provider}/brand-new-model"))
        assert "not brand-new-model itself" in response.text


@EVERY_VENDOR
def test_a_vendor_error_keeps_its_status_and_message(client: httpx.Client, vendor: Vendor) -> None:
    for status, stream in itertools.product((404, 429, 500, 503), (False, True)):
        response = client.post(CHAT, headers=ALL_KEYS, json=chat(f"{vendor.name}/status-{status}", stream=stream))
        assert response.status_code == status
        assert f"{vendor.title} says {status}." in message(response)


@EVERY_VENDOR
def test_a_wrong_key_is_the_vendors_to_refuse(client: httpx.Client, vendor: Vendor) -> None:
    status, words = vendor.bad_key
    wrong = {PROVIDER_DATA: f'{{"{vendor.name}_authorization": "Bearer sk-fake-wrong"}}'}
    response = client.post(CHAT, headers=wrong, json=chat(f"{vendor.name}/any"))
    assert response.status_code == status
    assert words in message(response)


def test_a_stream_that_fails_ends_with_an_error_event_and_one_that_ends_early_has_no_finish_reason(client: httpx.Client) -> None:
    for fault in ("hang-up", "error-event"):
        response = client.post(CHAT, headers=ALL_KEYS, json=chat(f"openai/{fault}", stream=True))
        assert events(response)[0]["choices"][0]["delta"]["content"] == ""
        assert events(response)[-1]["error"]["message"]
    response = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/no-finish", stream=True))
    assert streamed_text(response).startswith("This is a")
    assert not finished(response)


def test_a_silent_vendor_does_not_hold_up_others(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, headers=ALL_KEYS, json=chat("openai/stall", stream=True)) as stalled:
        lines = stalled.iter_lines()  # Kept, because dropping it hangs up.
        next(lines)
        assert client.post(CHAT, headers=ALL_KEYS, json=chat("openai/gpt-4o")).is_success


NOT_JSON = {"content": b'{"model": ', "headers": ALL_KEYS | {"content-type": "application/json"}}


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        pytest.param(NOT_JSON, 400, "JSON decode error", id="body is not JSON"),
        pytest.param({"json": {"model": MODELS[0]}, "headers": ALL_KEYS}, 400, "messages", id="no messages"),
        pytest.param({"json": chat("openai/no-such-model"), "headers": ALL_KEYS}, 404, "no-such-model", id="unknown model"),
        pytest.param({"json": chat("nobody/gpt-4o"), "headers": ALL_KEYS}, 404, "nobody/gpt-4o", id="unknown provider"),
        pytest.param({"json": chat("gpt-4o"), "headers": ALL_KEYS}, 404, "gpt-4o", id="no provider"),
        pytest.param({"json": chat(MODELS[0])}, 401, "API key", id="no header"),
        pytest.param({"json": chat(MODELS[0]), "headers": {PROVIDER_DATA: "{"}}, 401, "API key", id="not JSON"),
        pytest.param({"json": chat(MODELS[0]), "headers": {PROVIDER_DATA: "[1]"}}, 500, "Internal", id="a list"),
        pytest.param({"json": chat(MODELS[0], nonsense=1), "headers": ALL_KEYS}, 500, "Internal", id="unknown parameter"),
    ],
)
def test_a_call_that_cannot_work_gets_a_readable_error(server: httpx.Client, call: dict, status: int, words: str) -> None:
    """From the server itself. The front refuses some of these before."""
    response = server.post(CHAT, **call)
    assert response.status_code == status
    assert words in response.text
    assert "Traceback" not in response.text
    assert server.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0])).is_success
