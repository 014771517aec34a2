"""The OpenAI SDK for Python on the running gateway: what it sends reaches the vendor, what the vendor answers reaches it.

Here and in the tests of other libraries, `make test` takes the releases in uv.lock, where llama-stack holds the OpenAI SDK
back. `make libraries` takes the newest of each, in an environment of their own.
"""

import asyncio
import json

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from support.both_ends import BothEnds
from support.calls import EMBEDDINGS, HELLO, MODELS, WEATHER_TOOL, Weather
from support.gateway import PROVIDER_DATA
from support.vendors import KEYS, TOOL_CALL, VENDORS, vector


def test_lists_the_models(sdk: OpenAI) -> None:
    """Without keys, the five; with keys, the vendors' own as well."""
    assert [model.id for model in sdk.with_options(default_headers={PROVIDER_DATA: "{}"}).models.list()] == MODELS
    assert {*MODELS, "openai/openai-other", "anthropic/anthropic-other"} < {model.id for model in sdk.models.list()}


def test_retrieves_a_model_in_the_stock_servers_shape(sdk: OpenAI) -> None:
    model = sdk.models.retrieve(MODELS[0])
    assert model.identifier == MODELS[0]
    assert model.id is None


@pytest.mark.parametrize("vendor", KEYS)
def test_chat_and_stream(sdk: OpenAI, ends: BothEnds, vendor: str) -> None:
    question = {"model": f"{vendor}/any-model", "messages": HELLO, "temperature": 0, "seed": 7, "stop": ["END"]}
    answer = sdk.chat.completions.create(**question)
    assert answer.choices[0].message.content.endswith("You said: Hello")
    assert (answer.choices[0].finish_reason, answer.model) == ("stop", f"{vendor}/any-model")
    assert answer.usage.total_tokens > 0
    ends.assert_unchanged()
    # The SDK's own key goes nowhere.
    assert ends.requests[-1].headers["authorization"] == "Bearer sk-fake-unused"
    assert "sk-fake-unused" not in str(ends.vendors.seen[-1])

    chunks = list(sdk.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices).endswith("You said: Hello")
    assert choices[-1].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens > 0
    ends.assert_unchanged()


def test_stream_helper(sdk: OpenAI, ends: BothEnds) -> None:
    with sdk.chat.completions.stream(model=MODELS[0], messages=HELLO) as stream:
        assert any(event.type == "content.done" for event in stream)
        assert stream.get_final_completion().choices[0].message.content.endswith("You said: Hello")
    ends.assert_unchanged()


def test_async(ends: BothEnds, settings: dict) -> None:
    async def calls() -> None:
        async with AsyncOpenAI(**settings, http_client=ends.async_client()) as sdk:
            ask = sdk.chat.completions.create
            prompts = [f"caller {i}" for i in range(8)]
            answers = await asyncio.gather(
                *(ask(model=MODELS[0], messages=[{"role": "user", "content": prompt}]) for prompt in prompts)
            )
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.choices[0].message.content.endswith(f"You said: {prompt}")
            stream = await ask(model=MODELS[0], messages=HELLO, stream=True)
            words = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(words).endswith("You said: Hello")
            ends.assert_unchanged()

    asyncio.run(calls())


@pytest.mark.parametrize("vendor", KEYS)
def test_tool_call_and_its_result(sdk: OpenAI, ends: BothEnds, vendor: str) -> None:
    question = {"model": f"{vendor}/tool-call", "messages": HELLO, "tools": [WEATHER_TOOL], "tool_choice": "auto"}
    answer = sdk.chat.completions.create(**question, parallel_tool_calls=False)
    ends.assert_unchanged()
    assert answer.choices[0].finish_reason == "tool_calls"
    call = answer.choices[0].message.tool_calls[0]
    assert (call.id, call.function.name) == (TOOL_CALL["id"], "weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'}
    sdk.chat.completions.create(**question | {"messages": [*HELLO, answer.choices[0].message, result]})
    ends.assert_unchanged()
    assert ends.arrived["messages"][1]["tool_calls"] == [TOOL_CALL]


def test_streamed_tool_call(sdk: OpenAI, ends: BothEnds) -> None:
    stream = sdk.chat.completions.create(model="openai/tool-call", messages=HELLO, tools=[WEATHER_TOOL], stream=True)
    deltas = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert (deltas[0].id, deltas[0].function.name) == (TOOL_CALL["id"], "weather")
    assert json.loads("".join(delta.function.arguments for delta in deltas)) == {"city": "Paris"}
    ends.assert_unchanged()


def test_stream_helper_trips_over_a_tool_call(sdk: OpenAI) -> None:
    """The server adds `"type": null` to the deltas after the first, and the helper takes that for the call's type."""
    with (
        sdk.chat.completions.stream(model="openai/tool-call", messages=HELLO, tools=[WEATHER_TOOL]) as stream,
        pytest.raises(AssertionError),
    ):
        stream.get_final_completion()


def test_structured_output(sdk: OpenAI, ends: BothEnds) -> None:
    question = {"model": "openai/structured", "messages": HELLO, "response_format": Weather}
    answer = sdk.chat.completions.parse(**question)
    assert answer.choices[0].message.parsed == Weather(city="Paris", degrees=21)
    ends.assert_unchanged()
    assert ends.arrived["response_format"]["json_schema"]["strict"] is True
    with sdk.chat.completions.stream(**question) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Weather(city="Paris", degrees=21)
    ends.assert_unchanged()
    tool = openai.pydantic_function_tool(Weather, name="weather")
    answer = sdk.chat.completions.parse(model="openai/tool-call", messages=HELLO, tools=[tool])
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Paris")
    ends.assert_unchanged()


@pytest.mark.parametrize("model", EMBEDDINGS)
def test_embeddings(sdk: OpenAI, ends: BothEnds, model: str) -> None:
    """Left to itself the SDK asks for base64 and decodes it."""
    for asked in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = sdk.embeddings.create(model=model, input=["a text", "another"], dimensions=4, **asked)
        assert ends.arrived == ends.sent | {"model": model.partition("/")[2]}
        assert ends.arrived["encoding_format"] == asked.get("encoding_format", "base64")
        assert [item.index for item in answer.data] == [0, 1]
        numbers = answer.data[1].embedding
        assert isinstance(numbers, str) if "base64" in asked.values() else numbers == pytest.approx(vector("another", 4))


ERRORS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    529: openai.InternalServerError,
}


@pytest.mark.parametrize("vendor", KEYS)
def test_raises_the_error_of_the_vendors_status(sdk: OpenAI, vendor: str) -> None:
    title = next(each.title for each in VENDORS.values() if each.name == vendor)
    for status, error in ERRORS.items():
        with pytest.raises(error, match=rf"Error code: {status} - .*{title} says {status}\.") as caught:
            sdk.chat.completions.create(model=f"{vendor}/status-{status}", messages=HELLO)
        assert caught.value.status_code == status


def test_raises_for_what_the_gateway_itself_refuses(sdk: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(default_headers={PROVIDER_DATA: "{}"}).chat.completions.create(model=MODELS[0], messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="nobody/gpt-4o", messages=HELLO)
    with pytest.raises(openai.BadRequestError):
        sdk.chat.completions.create(model=MODELS[0], messages=[])
    with pytest.raises(openai.PermissionDeniedError):
        sdk.completions.create(model=MODELS[0], prompt="Hello")


def test_raises_when_a_stream_fails_and_takes_one_that_was_cut_for_a_short_answer(sdk: OpenAI) -> None:
    """Only the missing finish_reason tells."""
    question = {"messages": HELLO, "stream": True}
    for fault in ("hang-up", "error-event", "garbage"):
        with pytest.raises(openai.APIError):
            list(sdk.chat.completions.create(model=f"openai/{fault}", **question))
    chunks = list(sdk.chat.completions.create(model="openai/no-finish", **question))
    assert chunks[0].choices[0].delta.content == ""
    assert not any(chunk.choices[0].finish_reason for chunk in chunks)
