"""The Responses API on the running gateway, by hand and with the OpenAI SDK: both ends of each call compared."""

import asyncio
import itertools
import json
from collections import Counter

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from support.both_ends import BothEnds
from support.calls import ALL_KEYS, MODELS, WEATHER_FUNCTION, Weather, events, one_key, output_text, responses, vendor_of
from support.vendors import KEYS, TOOL_CALL, Vendors, text_of

# What the server adds to each call: it always streams from the vendor.
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}

# Chat's shape for a tool, in which the server leaves the type that Responses has beside the name.
TOLD = {"type": "function", "function": WEATHER_FUNCTION}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_answers_and_its_vendor_sees_its_own_key_alone(client: httpx.Client, vendors: Vendors, model: str) -> None:
    """By both forms of the header, of which the older one has a URL that is ignored."""
    for headers, stream in itertools.product((ALL_KEYS, one_key(model)), (False, True)):
        prompt = f"Hello, {model}, {headers is ALL_KEYS}, {stream}"
        answer = client.post("/v1/responses", headers=headers, json=responses(model, prompt, stream=stream))
        assert answer.status_code == 200
        if stream:
            assert answer.headers["content-type"].startswith("text/event-stream")
            deltas = [event["delta"] for event in events(answer) if event["type"] == "response.output_text.delta"]
            assert len(deltas) > 5
            assert "".join(deltas).endswith(f"You said: {prompt}")
            final = events(answer)[-1]["response"]
        else:
            assert output_text(answer).endswith(f"You said: {prompt}")
            final = answer.json()
        assert (final["object"], final["status"], final["model"]) == ("response", "completed", model)
        (seen,) = vendors.seen_with(prompt)
        assert (seen.vendor, seen.key) == (vendor_of(model), f"Bearer {KEYS[vendor_of(model)]}")
        text = json.dumps(seen.headers) + seen.body.decode()
        assert [key for key in KEYS.values() if key in text] == [KEYS[vendor_of(model)]]
        messages = [{"role": "user", "content": prompt}]
        assert seen.json == STREAMED | {"model": model.partition("/")[2], "messages": messages}
        assert "x-llamastack-provider-data" not in seen.headers


def test_without_a_header_no_key_is_sent(server: httpx.Client, vendors: Vendors) -> None:
    answer = server.post("/v1/responses", json=responses(MODELS[0], "no key here"))
    assert answer.status_code == 500
    assert "Incorrect API key" in answer.text
    assert {seen.key for seen in vendors.seen_with("no key here")} == {None}


# The stream

BEGIN = ["created", "in_progress", "output_item.added"]
END = ["output_item.done", "completed"]


def kinds(stream: list[dict]) -> list[str]:
    """The types of a stream's events, with those that repeat said once."""
    return [kind for kind, _ in itertools.groupby(event["type"].removeprefix("response.") for event in stream)]


@pytest.mark.parametrize("vendor", KEYS)
def test_a_stream_has_the_events_that_openai_documents(client: httpx.Client, vendor: str) -> None:
    """In their order and numbered; output_text.done, which would come before content_part.done, is missing."""
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=responses(f"{vendor}/any", stream=True))
    stream = events(answer)
    assert kinds(stream) == [*BEGIN, "content_part.added", "output_text.delta", "content_part.done", *END]
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    text = "".join(event["delta"] for event in stream if event["type"] == "response.output_text.delta")
    by_kind = {event["type"].removeprefix("response."): event for event in stream}
    (item,) = by_kind["completed"]["response"]["output"]
    assert by_kind["content_part.done"]["part"]["text"] == item["content"][0]["text"] == text
    assert by_kind["output_item.done"]["item"] == item
    assert {event["item_id"] for event in stream if "item_id" in event} == {item["id"]}
    assert {event["response"]["id"] for event in stream if "response" in event} == {by_kind["created"]["response"]["id"]}


def test_a_streamed_tool_call_has_the_events_that_openai_documents(client: httpx.Client) -> None:
    call = responses("openai/tool-call", stream=True, tools=[WEATHER_FUNCTION])
    stream = events(client.post("/v1/responses", headers=ALL_KEYS, json=call))
    assert kinds(stream) == [*BEGIN, "function_call_arguments.delta", "function_call_arguments.done", *END]
    arguments = "".join(event["delta"] for event in stream if "delta" in event)
    assert arguments == TOOL_CALL["function"]["arguments"]
    (item,) = stream[-1]["response"]["output"]
    assert (item["type"], item["call_id"], item["arguments"]) == ("function_call", TOOL_CALL["id"], arguments)


def test_usage_is_the_vendors(client: httpx.Client) -> None:
    for stream in (False, True):
        answer = client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0], "one two three", stream=stream))
        final = events(answer)[-1]["response"] if stream else answer.json()
        words = len(final["output"][0]["content"][0]["text"].split())
        usage = {name: final["usage"][name] for name in ("input_tokens", "output_tokens", "total_tokens")}
        assert usage == {"input_tokens": 3, "output_tokens": words, "total_tokens": 3 + words}


# The OpenAI SDK


@pytest.mark.parametrize("vendor", KEYS)
def test_create_and_stream(sdk: OpenAI, ends: BothEnds, vendor: str) -> None:
    answer = sdk.responses.create(model=f"{vendor}/any-model", input="Hello", instructions="Be brief.", temperature=0)
    assert answer.output_text.endswith("You said: Hello")
    assert (answer.model, answer.instructions, answer.status) == (f"{vendor}/any-model", "Be brief.", "completed")
    messages = [{"role": "system", "content": "Be brief."}, *HELLO["messages"]]
    assert ends.arrived == STREAMED | {"model": "any-model", "messages": messages, "temperature": 0}
    # The SDK's own key goes nowhere.
    assert ends.requests[-1].headers["authorization"] == "Bearer sk-fake-unused"
    assert "sk-fake-unused" not in str(ends.vendors.seen[-1])

    stream = list(sdk.responses.create(model=f"{vendor}/any-model", input="Hello", stream=True))
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text.endswith("You said: Hello")
    assert stream[-1].type == "response.completed"
    assert stream[-1].response.output_text == text


def test_stream_helper(sdk: OpenAI, ends: BothEnds) -> None:
    with sdk.responses.stream(model=MODELS[4], input="Hello") as stream:
        kinds = Counter(event.type for event in stream)
        assert stream.get_final_response().output_text.endswith("You said: Hello")
    assert kinds["response.output_text.delta"] > 5
    assert ends.arrived == STREAMED | HELLO | {"model": "claude-haiku-4-5-20251001"}


def test_async(ends: BothEnds, settings: dict) -> None:
    async def calls() -> None:
        async with AsyncOpenAI(**settings, http_client=ends.async_client()) as sdk:
            ask = sdk.responses.create
            prompts = [f"caller {i} of responses" for i in range(8)]
            answers = await asyncio.gather(*(ask(model=MODELS[i % 5], input=prompt) for i, prompt in enumerate(prompts)))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.output_text.endswith(f"You said: {prompt}")

    asyncio.run(calls())


@pytest.mark.parametrize("vendor", KEYS)
def test_a_function_tool_and_its_output(sdk: OpenAI, ends: BothEnds, vendor: str) -> None:
    question = {"model": f"{vendor}/tool-call", "tools": [WEATHER_FUNCTION], "tool_choice": "auto", "parallel_tool_calls": False}
    answer = sdk.responses.create(input="Hello", **question)
    told = STREAMED | {"model": "tool-call", "tools": [TOLD], "tool_choice": "auto", "parallel_tool_calls": False}
    assert ends.arrived == told | HELLO
    (call,) = answer.output
    assert (call.type, call.call_id, call.name) == ("function_call", TOOL_CALL["id"], "weather")
    assert json.loads(call.arguments) == {"city": "Paris"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 21}'}
    answer = sdk.responses.create(input=[*HELLO["messages"], *answer.output, output], **question)
    assert answer.output_text.endswith('You said: {"degrees": 21}')
    assert ends.arrived == told | {
        "messages": [
            *HELLO["messages"],
            {"role": "assistant", "tool_calls": [{"index": 0} | TOOL_CALL]},
            {"role": "tool", "tool_call_id": TOOL_CALL["id"], "content": '{"degrees": 21}'},
        ]
    }


def test_parse_into_a_schema(sdk: OpenAI, ends: BothEnds) -> None:
    answer = sdk.responses.parse(model="openai/structured", input="Hello", text_format=Weather)
    assert answer.output_parsed == Weather(city="Paris", degrees=21)
    schema = ends.arrived["response_format"]["json_schema"]
    assert schema["schema"]["properties"]["degrees"]["type"] == "integer"
    with sdk.responses.stream(model="openai/structured", input="Hello", text_format=Weather) as stream:
        assert stream.get_final_response().output_parsed == Weather(city="Paris", degrees=21)
    tool = openai.pydantic_function_tool(Weather, name="weather")
    answer = sdk.responses.parse(model="openai/tool-call", input="Hello", tools=[tool])
    assert answer.output[0].parsed_arguments == Weather(city="Paris")


@pytest.mark.parametrize("vendor", KEYS)
def test_several_turns_by_sending_the_history(sdk: OpenAI, ends: BothEnds, vendor: str) -> None:
    history: list = [{"role": "developer", "content": "Count."}]
    for turn in ("one", "two", "three"):
        history.append({"role": "user", "content": turn})
        answer = sdk.responses.create(model=f"{vendor}/any", input=history)
        assert answer.output_text.endswith(f"You said: {turn}")
        history += answer.output
    roles = [message["role"] for message in ends.arrived["messages"]]
    assert roles == ["developer", "user", "assistant", "user", "assistant", "user"]
    assert text_of(ends.arrived["messages"][:3]).endswith("You said: one")
