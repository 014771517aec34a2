"""What the Responses API cannot do here, with what the caller reads and the way around; and that nothing of it is kept."""

import contextlib
import itertools
import json
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from support.both_ends import BothEnds
from support.calls import ALL_KEYS, MODELS, WEATHER_FUNCTION, WRONG_KEY, Weather, events, responses
from support.gateway import PROVIDER_DATA, Gateway, eventually
from support.vendors import KEYS, TOOL_CALLS, VENDORS, Vendors

# What reaches the vendor of a plain call.
HELLO = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}

NO_CONVERSATION = f"conv_{'a' * 48}"
UNEXPECTED = "An unexpected error occurred while generating the response."
NO_SUCH_TYPE = "Input tag '{}' found using 'type' does not match any of the expected tags"

# What a call asks for beyond its model and input, the status, and what the caller reads.
REFUSED = {
    "web_search": ({"tools": [{"type": "web_search"}]}, 400, "Tool 'web_search' not found"),
    "code_interpreter": (
        {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]},
        400,
        NO_SUCH_TYPE.format("code_interpreter"),
    ),
    "image_generation": ({"tools": [{"type": "image_generation"}]}, 400, NO_SUCH_TYPE.format("image_generation")),
    "custom tool": ({"tools": [{"type": "custom", "name": "shell"}]}, 400, NO_SUCH_TYPE.format("custom")),
    "encrypted reasoning": (
        {"include": ["reasoning.encrypted_content"]},
        400,
        "reasoning.encrypted_content is not supported by Llama Stack.",
    ),
    "background without store": (
        {"background": True, "store": False},
        400,
        "Cannot use 'background' with 'store=False'. Background responses must be stored.",
    ),
    "conversation": ({"conversation": NO_CONVERSATION}, 404, f"Conversation '{NO_CONVERSATION}' not found."),
    "conversation as an object": ({"conversation": {"id": NO_CONVERSATION}}, 400, "Input should be a valid string"),
    "previous_response_id": (
        {"previous_response_id": "resp_1"},
        404,
        "Response 'resp_1' not found. Use 'client.responses.list()' to list available Responses.",
    ),
    "stored prompt": ({"prompt": {"id": f"pmpt_{'a' * 48}"}}, 400, f"Prompt pmpt_{'a' * 48}:default not found"),
    "item_reference": ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 400, "Input should be a valid string"),
    "refusal in the history": (
        {"input": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]},
        400,
        "does not yet support content type",
    ),
    "image of a file id": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]},
        404,
        "File 'file-1' not found. Use 'client.files.list()' to list available Files.",
    ),
    "file of a file id": (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}]},
        404,
        "File 'file-1' not found. Use 'client.files.list()' to list available Files.",
    ),
    "few tokens": ({"max_output_tokens": 15}, 400, "Input should be greater than or equal to 16"),
    "truncation": ({"truncation": "auto"}, 500, "Truncation mode 'auto' is not supported."),
    "a parameter of another API": ({"top_k": 3}, 500, UNEXPECTED),
}


@pytest.mark.parametrize(("fields", "status", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(client: httpx.Client, vendors: Vendors, fields: dict, status: int, words: str) -> None:
    """A stream that is refused late has begun, and tells of it in an event that OpenAI's SDK raises, or as failed."""
    before = len(vendors.seen)
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0]) | fields)
    assert answer.status_code == status
    assert words in answer.text
    streamed = client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0], stream=True) | fields)
    if streamed.status_code == 200:
        last = events(streamed)[-1]
        assert words in json.dumps(last["error"] if "error" in last else last["response"]["error"], ensure_ascii=False)
    else:
        assert streamed.status_code == 400
    assert len(vendors.seen) == before


def test_the_sdk_raises_what_is_refused_in_a_stream(sdk: OpenAI) -> None:
    with pytest.raises(openai.APIError, match="Response 'resp_1' not found"):
        list(sdk.responses.create(model=MODELS[0], input="Hello", previous_response_id="resp_1", stream=True))


def test_nothing_runs_in_the_background(client: httpx.Client, vendors: Vendors) -> None:
    call = responses(MODELS[0], "not in the background", background=True)
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=call)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        500,
        "Internal server error: An unexpected error occurred.",
    )
    assert client.post("/v1/responses", headers=ALL_KEYS, json=call | {"stream": True}).status_code == 400
    assert vendors.seen_with("not in the background") == []


@pytest.mark.parametrize("path", ["", "/cancel", "/input_items"])
def test_a_response_cannot_be_reached_by_its_id(client: httpx.Client, path: str) -> None:
    identity = client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0])).json()["id"]
    for method in ("GET", "POST", "DELETE"):
        answer = client.request(method, f"/v1/responses/{identity}{path}", headers=ALL_KEYS)
        assert answer.status_code == 403
        assert "insufficient permissions for route /v1/responses/" in answer.json()["error"]["message"]


def test_the_sdk_raises_for_what_needs_an_id(sdk: OpenAI) -> None:
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


@pytest.mark.parametrize("status", [400, 401, 404, 429, 503])
@pytest.mark.parametrize("vendor", KEYS)
def test_a_vendors_error_keeps_its_words_and_loses_its_status(client: httpx.Client, vendor: str, status: int) -> None:
    title = next(each.title for each in VENDORS.values() if each.name == vendor)
    call = responses(f"{vendor}/status-{status}")
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=call)
    assert (answer.status_code, list(answer.json())) == (500, ["detail"])
    assert f"{title} says {status}." in answer.json()["detail"]
    streamed = client.post("/v1/responses", headers=ALL_KEYS, json=call | {"stream": True})
    last = events(streamed)[-1]
    assert (streamed.status_code, last["type"], last["response"]["status"]) == (200, "response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert f"{title} says {status}." in last["response"]["error"]["message"]


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


def test_a_model_of_nobody_is_a_404(client: httpx.Client) -> None:
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=responses("nobody/gpt-4o"))
    assert (answer.status_code, answer.json()["detail"]) == (
        404,
        "Model 'nobody/gpt-4o' not found. Use 'client.models.list()' to list available Models.",
    )


@pytest.mark.parametrize("fault", ["hang-up", "error-event", "garbage"])
def test_an_answer_that_breaks_off_is_a_failed_one(client: httpx.Client, fault: str) -> None:
    call = responses(f"openai/{fault}")
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=call)
    assert (answer.status_code, answer.json()) == (500, {"detail": UNEXPECTED})
    stream = events(client.post("/v1/responses", headers=ALL_KEYS, json=call | {"stream": True}))
    assert "response.output_text.delta" in {event["type"] for event in stream}
    assert (stream[-1]["type"], stream[-1]["response"]["error"]["message"]) == ("response.failed", UNEXPECTED)


def test_an_answer_that_ends_early_passes_for_a_whole_one(client: httpx.Client) -> None:
    """A vendor whose stream ends cleanly without its last events: only the missing usage tells."""
    for stream in (False, True):
        answer = client.post("/v1/responses", headers=ALL_KEYS, json=responses("openai/no-finish", stream=stream))
        final = events(answer)[-1]["response"] if stream else answer.json()
        assert (final["status"], final["usage"]) == ("completed", None)


def test_a_callers_time_limit_passes_to_the_vendors_side(client: httpx.Client) -> None:
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=responses("openai/stall", timeout=0.2))
    assert (answer.status_code, answer.json()) == (500, {"detail": UNEXPECTED})


# What is lost on the way, and the way around: what is inside extra_body replaces what the server would send


def test_a_schema_arrives_without_strict(sdk: OpenAI, ends: BothEnds) -> None:
    sdk.responses.parse(model="openai/structured", input="Hello", text_format=Weather)
    assert ends.sent["text"]["format"]["strict"] is True
    assert set(ends.arrived["response_format"]["json_schema"]) == {"name", "schema"}
    strict = {"type": "json_schema", "json_schema": {"name": "w", "schema": {}, "strict": True}}
    around = {"extra_body": {"response_format": strict}}
    answer = sdk.responses.parse(model="openai/structured", input="Hello", text_format=Weather, extra_body=around)
    assert ends.arrived["response_format"] == strict
    assert answer.output_parsed == Weather(city="Paris", degrees=21)


@pytest.mark.parametrize(
    ("lost", "around"),
    [
        ({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
        ({"metadata": {"team": "a"}}, {"metadata": {"team": "a"}, "store": True}),
        ({"top_k": 3}, {"top_k": 3}),
        ({"tools": [{"type": "web_search"}]}, {"web_search_options": {}}),
        ({"tools": [{"type": "custom", "name": "shell"}]}, {"tools": [{"type": "custom", "custom": {"name": "shell"}}]}),
        ({"tools": [WEATHER_FUNCTION], "tool_choice": "none"}, {"tool_choice": "none"}),
    ],
    ids=["verbosity", "metadata", "another API's", "web search", "custom tool", "no tool choice"],
)
def test_what_is_lost_arrives_inside_extra_body(client: httpx.Client, vendors: Vendors, lost: dict, around: dict) -> None:
    """With the SDK that is an extra_body within its own. Web search this way is for OpenAI's models that search in chat."""
    before = len(vendors.seen)
    call = responses(MODELS[0])
    if client.post("/v1/responses", headers=ALL_KEYS, json=call | lost).is_success:
        assert not set(around) & set(vendors.seen[-1].json)
    else:
        assert len(vendors.seen) == before
    assert client.post("/v1/responses", headers=ALL_KEYS, json=call | {"extra_body": around}).is_success
    assert vendors.seen[-1].json == HELLO | around


def test_no_tool_choice_drops_the_tools_and_leaves_their_parallel_calls(sdk: OpenAI, ends: BothEnds) -> None:
    """OpenAI refuses parallel_tool_calls without tools; left out, it is true."""
    question = {"model": MODELS[0], "input": "Hello", "tools": [WEATHER_FUNCTION], "tool_choice": "none"}
    sdk.responses.create(**question)
    assert ("tools" in ends.arrived, ends.arrived["parallel_tool_calls"]) == (False, True)
    sdk.responses.create(**question, parallel_tool_calls=None)
    assert ends.arrived == HELLO


def test_parallel_tool_calls_in_a_stream_share_an_index(client: httpx.Client) -> None:
    """Which the `.stream()` helper of OpenAI's SDK refuses from release 3 on; its final response has them right."""
    call = responses("openai/tool-calls", stream=True, tools=[WEATHER_FUNCTION])
    stream = events(client.post("/v1/responses", headers=ALL_KEYS, json=call))
    added = [event for event in stream if event["type"] == "response.output_item.added"]
    assert [event["item"]["call_id"] for event in added] == [call["id"] for call in TOOL_CALLS]
    assert [event["output_index"] for event in added] == [0, 0]
    assert [item["call_id"] for item in stream[-1]["response"]["output"]] == [call["id"] for call in TOOL_CALLS]


def test_file_search_is_told_to_the_model_and_finds_nothing(client: httpx.Client, vendors: Vendors) -> None:
    """There is nothing to search in; the model is told of a function file_search."""
    call = responses("openai/any", "search the files", tools=[{"type": "file_search", "vector_store_ids": ["vs_1"]}])
    assert client.post("/v1/responses", headers=ALL_KEYS, json=call).is_success
    (seen,) = vendors.seen_with("search the files")
    assert seen.json["tools"][0]["function"]["name"] == "file_search"


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


def in_memory(pid: int, pattern: bytes) -> set[bytes]:
    """What a process has of `pattern` in the memory that it may write to. Source: proc(5), maps and mem."""
    found: set[bytes] = set()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            if rights.startswith("rw"):
                start, end = (int(address, 16) for address in span.split("-"))
                with contextlib.suppress(OSError):
                    memory.seek(start)
                    found |= set(re.findall(pattern, memory.read(end - start)))
    return found


@pytest.mark.parametrize("options", [{"stream": True}, {"background": True}], ids=["stream", "background"])
def test_a_key_is_let_go_with_its_call(client: httpx.Client, gateway: Gateway, options: dict) -> None:
    """Most of ten keys: free memory holds one until it is used for something else, such as for other keys of that length."""

    def respond(marker: str, number: int, **options: bool) -> None:
        data = {"openai_authorization": f"Bearer {KEYS['openai']}-{marker}-{number}"}
        client.post("/v1/responses", headers={PROVIDER_DATA: json.dumps(data)}, json=responses(MODELS[0], **options))

    marker = uuid.uuid4().hex
    for number in range(10):
        respond(marker, number, **options)

    def others_call_and_most_are_gone() -> bool:
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda number: respond(uuid.uuid4().hex, number % 10, stream=number % 2 == 0), range(40)))
        return len(in_memory(gateway.server, marker.encode() + rb"-\d")) <= 3

    assert eventually(others_call_and_most_are_gone, 60)
