"""What the stock server changes, drops or refuses of a chat call, and the way around each."""

import httpx
import openai
import pytest
from openai import OpenAI
from support.both_ends import BothEnds
from support.calls import ALL_KEYS, HELLO, MODELS, PIXEL, WEATHER_TOOL
from support.vendors import REPORTED, TOOL_CALL, Vendors


def test_an_error_has_the_vendors_words_but_not_its_fields(sdk: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        sdk.chat.completions.create(model="openai/status-401", messages=HELLO)
    assert "'code': 'invalid_api_key'" in caught.value.message
    assert (caught.value.code, caught.value.type, caught.value.request_id) == (None, None, None)


@pytest.mark.parametrize(("retries", "attempts"), [(2, 9), (0, 3)], ids=["the SDK's default", "switched off in the client"])
def test_retries_of_client_and_server_multiply(sdk: OpenAI, vendors: Vendors, retries: int, attempts: int) -> None:
    """The server's own SDK tries three times; so does the client's, unless it is told not to."""
    marker = f"marker retries {retries}"
    with pytest.raises(openai.RateLimitError):
        sdk.with_options(max_retries=retries).chat.completions.create(
            model="openai/status-429", messages=[{"role": "user", "content": marker}]
        )
    assert len(vendors.seen_with(marker)) == attempts


def test_the_vendors_headers_stay_behind(sdk: OpenAI, client: httpx.Client) -> None:
    answer = sdk.chat.completions.with_raw_response.create(model=MODELS[0], messages=HELLO)
    assert not set(REPORTED) & set(answer.headers)
    refused = client.post("/v1/chat/completions", headers=ALL_KEYS, json={"model": "openai/status-429", "messages": HELLO})
    assert not {"retry-after", "retry-after-ms", *REPORTED} & set(refused.headers)


def test_a_callers_headers_stay_behind_unless_named_in_the_body(sdk: OpenAI, ends: BothEnds) -> None:
    ask, header = sdk.chat.completions.create, {"anthropic-beta": "some-beta"}
    ask(model="anthropic/any", messages=HELLO, extra_headers=header)
    assert "anthropic-beta" not in ends.vendors.seen[-1].headers
    ask(model="anthropic/any", messages=HELLO, extra_body={"extra_headers": header})
    assert ends.vendors.seen[-1].headers["anthropic-beta"] == "some-beta"
    assert "extra_headers" not in ends.arrived


def test_unknown_parameters_pass_inside_extra_body(sdk: OpenAI, ends: BothEnds) -> None:
    """With the SDK that is an extra_body within its own."""
    with pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model=MODELS[0], messages=HELLO, extra_body={"top_k": 3})
    sdk.chat.completions.create(model=MODELS[0], messages=HELLO, extra_body={"extra_body": {"top_k": 3}})
    assert ends.arrived["top_k"] == 3


def test_a_callers_time_limit_passes_to_the_vendors_side(sdk: OpenAI) -> None:
    """Otherwise the server waits ten minutes, three times over."""
    with pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model="openai/stall", messages=HELLO, extra_body={"timeout": 0.2})


REFUSED_OR_DROPPED = {
    "input_audio": {
        "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]
    },
    "image in a tool's result": {
        "messages": [
            {"role": "assistant", "tool_calls": [TOOL_CALL]},
            {"role": "tool", "tool_call_id": "call_fake", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]},
        ]
    },
    "refusal part": {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, *HELLO]},
    "function role": {"messages": [{"role": "function", "name": "f", "content": "1"}]},
    "cache_control": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}]
    },
    "thought signature": {
        "messages": [
            {"role": "assistant", "tool_calls": [TOOL_CALL | {"extra_content": {"google": {"thought_signature": "s"}}}]},
            {"role": "tool", "tool_call_id": "call_fake", "content": "1"},
        ]
    },
    "custom tool": {"tools": [{"type": "custom", "custom": {"name": "shell"}}]},
    "tools kept with tool_choice none": {"tools": [WEATHER_TOOL], "tool_choice": "none"},
    "service_tier scale": {"service_tier": "scale"},
    "reasoning_effort of tomorrow": {"reasoning_effort": "extreme"},
}


@pytest.mark.parametrize("fields", REFUSED_OR_DROPPED.values(), ids=REFUSED_OR_DROPPED)
def test_what_is_refused_or_dropped_passes_inside_extra_body(client: httpx.Client, vendors: Vendors, fields: dict) -> None:
    """What is inside extra_body replaces what is beside it, after the server has looked at that."""
    plain = {"model": MODELS[0], "messages": HELLO} | fields
    before = len(vendors.seen)
    response = client.post("/v1/chat/completions", headers=ALL_KEYS, json=plain)
    if response.is_success:
        assert any(vendors.seen[-1].json.get(name) != value for name, value in fields.items())
    else:
        assert response.status_code == 400
        assert len(vendors.seen) == before
    around = {"model": MODELS[0], "messages": HELLO, "extra_body": fields}
    assert client.post("/v1/chat/completions", headers=ALL_KEYS, json=around).is_success
    assert vendors.seen[-1].json == {"model": "gpt-4o", "messages": HELLO} | fields


def test_answers_gain_null_fields_and_the_gateways_name_for_the_model(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", headers=ALL_KEYS, json={"model": MODELS[0], "messages": HELLO}).json()
    assert answer["model"] == MODELS[0]
    assert answer["service_tier"] is None
    assert answer["choices"][0]["message"]["tool_calls"] is None


def test_a_client_that_keeps_its_connection_survives_the_servers_closing_it(sdk: OpenAI) -> None:
    """After passing on an error the server closes the connection without announcing it."""
    for _ in range(30):
        with pytest.raises(openai.NotFoundError):
            sdk.chat.completions.create(model="openai/no-such-model", messages=HELLO)
        assert sdk.with_options(max_retries=1).chat.completions.create(model=MODELS[0], messages=HELLO).choices
