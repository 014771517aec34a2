"""What the Responses API cannot do here, as far as test_exchanges.py does not show it; and that nothing of it is kept."""

import itertools
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI
from support.calls import ALL_KEYS, MODELS, WEATHER_FUNCTION, WRONG_KEY, events, message, responses
from support.gateway import PROVIDER_DATA, Gateway, in_memory, wait_for
from support.vendors import KEYS, Vendors

NO_CONVERSATION = f"conv_{'a' * 48}"
UNEXPECTED = "An unexpected error occurred while generating the response."


def test_nothing_runs_in_the_background(client: httpx.Client, vendors: Vendors) -> None:
    call = responses(MODELS[0], "not in the background", background=True)
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=call)
    assert (answer.status_code, message(answer)) == (500, "Internal server error: An unexpected error occurred.")
    assert client.post("/v1/responses", headers=ALL_KEYS, json=call | {"stream": True}).status_code == 400
    assert vendors.seen_with("not in the background") == []


def test_a_response_cannot_be_reached_by_its_id(client: httpx.Client) -> None:
    identity = client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0])).json()["id"]
    for path, method in itertools.product(("", "/cancel", "/input_items"), ("GET", "POST", "DELETE")):
        answer = client.request(method, f"/v1/responses/{identity}{path}", headers=ALL_KEYS)
        assert answer.status_code == 403
        assert "insufficient permissions for route /v1/responses/" in message(answer)


def test_the_sdk_raises_what_is_refused(sdk: OpenAI) -> None:
    with pytest.raises(openai.APIError, match="Response 'resp_1' not found"):
        list(sdk.responses.create(model=MODELS[0], input="Hello", previous_response_id="resp_1", stream=True))
    for call in (
        lambda: sdk.responses.retrieve("resp_1"),
        lambda: sdk.responses.cancel("resp_1"),
        lambda: sdk.responses.delete("resp_1"),
        lambda: sdk.responses.input_items.list("resp_1"),
        lambda: sdk.conversations.create(),
        lambda: sdk.files.list(),
        lambda: sdk.vector_stores.list(),
    ):
        with pytest.raises(openai.PermissionDeniedError, match="insufficient permissions"):
            call()


# A vendor's error


def test_a_wrong_key_is_a_500_with_the_vendors_words(client: httpx.Client, sdk: OpenAI, vendors: Vendors) -> None:
    """Which the SDK takes for a fault of the server, and tries three times unless it is told not to. Chat says 401."""
    answer = client.post("/v1/responses", headers=WRONG_KEY, json=responses(MODELS[0]))
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("Incorrect API key provided.")
    wrong = sdk.with_options(default_headers=WRONG_KEY, max_retries=2)
    with pytest.raises(openai.InternalServerError, match="Incorrect API key provided"):
        wrong.responses.create(model=MODELS[0], input="a wrong key thrice")
    assert len(vendors.seen_with("a wrong key thrice")) == 3
    with pytest.raises(openai.AuthenticationError):
        wrong.chat.completions.create(model=MODELS[0], messages=[{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize("fault", ["hang-up", "error-event", "garbage"])
def test_an_answer_that_breaks_off_is_a_failed_one(client: httpx.Client, fault: str) -> None:
    call = responses(f"openai/{fault}")
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=call)
    assert (answer.status_code, answer.json()) == (500, {"detail": UNEXPECTED})
    stream = events(client.post("/v1/responses", headers=ALL_KEYS, json=call | {"stream": True}))
    assert "response.output_text.delta" in {event["type"] for event in stream}
    assert (stream[-1]["type"], stream[-1]["response"]["error"]["message"]) == ("response.failed", UNEXPECTED)


def test_a_callers_time_limit_passes_to_the_vendors_side(client: httpx.Client) -> None:
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=responses("openai/stall", timeout=0.2))
    assert (answer.status_code, answer.json()) == (500, {"detail": UNEXPECTED})


# Nothing is kept

MARKER = "nobody-keeps-this"
OPTIONS = {
    "store": [None, True, False],
    "background": [None, True],
    "conversation": [None, NO_CONVERSATION],
    "previous_response_id": [None, "resp_1"],
    "stream": [False, True],
}


def test_nothing_is_kept_whatever_a_call_says(client: httpx.Client, gateway: Gateway, vendors: Vendors) -> None:
    data = {"openai_authorization": f"Bearer {KEYS['openai']}-{MARKER}"}
    headers = {PROVIDER_DATA: json.dumps(data)}
    answered = 0
    for values in itertools.product(*OPTIONS.values()):
        options = {name: value for name, value in zip(OPTIONS, values, strict=True) if value is not None}
        call = responses("openai/any", MARKER, instructions=MARKER, metadata={"m": MARKER}, **options)
        answered += client.post("/v1/responses", headers=headers, json=call).is_success
    for model in ("openai/tool-call", "openai/status-429", "openai/hang-up", "nobody/any"):
        call = responses(model, MARKER, tools=[WEATHER_FUNCTION | {"description": MARKER}])
        client.post("/v1/responses", headers=headers, json=call)
    assert answered >= 6
    assert len(vendors.seen_with(MARKER)) >= 6
    time.sleep(1)  # The server may store after it has answered.
    for path in ("/v1/responses", "/v1/responses?limit=100&model=openai/any"):
        assert client.get(path, headers=ALL_KEYS).json()["data"] == []
    assert MARKER not in client.get("/v1/chat/completions", headers=ALL_KEYS).text
    files = [path for path in gateway.home.rglob("*") if path.is_file()]
    assert {"keeps-nothing.db", gateway.log_file.name} <= {path.name for path in files}
    for path in files:
        assert MARKER.encode() not in path.read_bytes(), f"{path.name} holds what a caller sent"


def test_memory_does_not_grow_with_responses(client: httpx.Client, gateway: Gateway) -> None:
    """30 MB of prompts, each stored or queued as far as the caller knows."""

    def send(count: int) -> None:
        for number in range(count):
            for options, status in (({}, 200), ({"stream": True}, 200), ({"background": True}, 500)):
                call = responses(MODELS[0], f"{number}" + "x" * 500_000, **options)
                assert client.post("/v1/responses", headers=ALL_KEYS, json=call).status_code == status

    send(20)
    before = gateway.resident()
    send(20)
    assert gateway.resident() - before < 20_000_000


@pytest.mark.parametrize("options", [{"stream": True}, {"background": True}], ids=["stream", "background"])
def test_a_key_is_let_go_with_its_call(client: httpx.Client, gateway: Gateway, options: dict) -> None:
    """Most of ten keys: free memory holds one until it is used for something else, such as for other keys of that length."""

    def respond(marker: str, number: int, **options: bool) -> None:
        data = {"openai_authorization": f"Bearer {KEYS['openai']}-{marker}-{number}"}
        client.post("/v1/responses", headers={PROVIDER_DATA: json.dumps(data)}, json=responses(MODELS[0], **options))

    marker = uuid.uuid4().hex
    for number in range(10):
        respond(marker, number, **options)

    def left() -> set[bytes]:
        """Those that are there after others have called."""
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda number: respond(uuid.uuid4().hex, number % 10, stream=number % 2 == 0), range(40)))
        return in_memory(gateway.server, marker.encode() + rb"-\d")

    wait_for(lambda: len(left()) <= 3, seen=left)
