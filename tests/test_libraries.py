"""Clients that nobody here wrote, on the running gateway: what they send reaches the vendor, what it answers reaches them.

`make test` runs this with the releases in uv.lock, where llama-stack holds the OpenAI SDK back. `make libraries` runs it
with the newest release of each, in an environment of their own.
"""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import llama_stack_client
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from llama_stack_client import AsyncLlamaStackClient, LlamaStackClient
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from world.calls import ALL_KEYS, EMBEDDINGS, MODELS
from world.gateway import PROVIDER_DATA, Gateway, clean_environ
from world.vendors import REPORTED, TOOL_CALL, VENDORS, Vendors, vector

EVERY_VENDOR = pytest.mark.parametrize("vendor", ["openai", "gemini", "anthropic"])
HELLO = [{"role": "user", "content": "Hello"}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Weather(BaseModel):
    """The weather in a city."""

    city: str = Field(description="Its name")
    degrees: int = 0


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": ["string", "null"], "enum": ["C", "F", None]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def without_nulls(value: Any) -> Any:
    """A body without the parameters, and the fields of messages, that are null: the server leaves those out."""
    if isinstance(value, dict):
        return {name: without_nulls(item) if name == "messages" else item for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class Wire:
    """Both ends of a library's calls: what it sent, and what arrived at the vendor."""

    def __init__(self, vendors: Vendors) -> None:
        self.vendors = vendors
        self.requests: list[httpx.Request] = []
        # The server closes a connection after an error without saying so: each call gets one of its own.
        self.settings = {"trust_env": False, "timeout": 30, "limits": httpx.Limits(max_keepalive_connections=0)}
        self.client = httpx.Client(event_hooks={"request": [self.requests.append]}, **self.settings)

    def async_client(self) -> httpx.AsyncClient:
        """A client for one event loop."""

        async def note(request: httpx.Request) -> None:
            self.requests.append(request)

        return httpx.AsyncClient(event_hooks={"request": [note]}, **self.settings)

    @property
    def sent(self) -> dict:
        return json.loads(self.requests[-1].content)

    @property
    def arrived(self) -> dict:
        return self.vendors.seen[-1].json

    def assert_unchanged(self) -> None:
        """The vendor got exactly what the library sent, with its own name for the model."""
        assert self.arrived == without_nulls(self.sent) | {"model": self.sent["model"].partition("/")[2]}


@pytest.fixture
def wire(vendors: Vendors) -> Iterator[Wire]:
    wire = Wire(vendors)
    yield wire
    wire.client.close()


@pytest.fixture
def settings(gateway: Gateway) -> dict:
    """How an OpenAI client is pointed at the gateway. It insists on a key of its own, which goes nowhere."""
    return {"base_url": f"{gateway.url}/v1", "api_key": "sk-fake-unused", "default_headers": ALL_KEYS}


@pytest.fixture
def sdk(wire: Wire, settings: dict) -> OpenAI:
    """The OpenAI SDK with its retries switched off: the server has its own."""
    return OpenAI(**settings, http_client=wire.client, max_retries=0)


# The OpenAI SDK


def test_openai_lists_the_models(sdk: OpenAI) -> None:
    """Without keys, the five; with keys, the vendors' own as well."""
    assert [model.id for model in sdk.with_options(default_headers={PROVIDER_DATA: "{}"}).models.list()] == MODELS
    assert {*MODELS, "openai/openai-other", "anthropic/anthropic-other"} < {model.id for model in sdk.models.list()}


def test_openai_retrieves_a_model_in_the_stock_servers_shape(sdk: OpenAI) -> None:
    model = sdk.models.retrieve(MODELS[0])
    assert model.identifier == MODELS[0]
    assert model.id is None


@EVERY_VENDOR
def test_openai_chat(sdk: OpenAI, wire: Wire, vendor: str) -> None:
    answer = sdk.chat.completions.create(model=f"{vendor}/any-model", messages=HELLO, temperature=0, seed=7, stop=["END"])
    assert answer.choices[0].message.content.endswith("You said: Hello")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens > 0
    assert answer.model == f"{vendor}/any-model"
    wire.assert_unchanged()


def test_the_sdks_own_key_goes_nowhere(sdk: OpenAI, wire: Wire) -> None:
    sdk.chat.completions.create(model=MODELS[0], messages=HELLO)
    assert wire.requests[-1].headers["authorization"] == "Bearer sk-fake-unused"
    assert "sk-fake-unused" not in str(wire.vendors.seen[-1])


@EVERY_VENDOR
def test_openai_streams(sdk: OpenAI, wire: Wire, vendor: str) -> None:
    options = {"include_usage": True}
    stream = sdk.chat.completions.create(model=f"{vendor}/any-model", messages=HELLO, stream=True, stream_options=options)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]).endswith("You said: Hello")
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens > 0
    wire.assert_unchanged()


def test_openai_stream_helper(sdk: OpenAI, wire: Wire) -> None:
    with sdk.chat.completions.stream(model=MODELS[0], messages=HELLO) as stream:
        assert any(event.type == "content.done" for event in stream)
        assert stream.get_final_completion().choices[0].message.content.endswith("You said: Hello")
    wire.assert_unchanged()


def test_openai_async(wire: Wire, settings: dict) -> None:
    async def calls() -> None:
        async with AsyncOpenAI(**settings, http_client=wire.async_client()) as sdk:
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
            wire.assert_unchanged()

    asyncio.run(calls())


@EVERY_VENDOR
def test_openai_tool_call_and_its_result(sdk: OpenAI, wire: Wire, vendor: str) -> None:
    question = {"model": f"{vendor}/tool-call", "messages": HELLO, "tools": [WEATHER_TOOL], "tool_choice": "auto"}
    answer = sdk.chat.completions.create(**question, parallel_tool_calls=False)
    wire.assert_unchanged()
    assert answer.choices[0].finish_reason == "tool_calls"
    call = answer.choices[0].message.tool_calls[0]
    assert (call.id, call.function.name) == (TOOL_CALL["id"], "weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'}
    sdk.chat.completions.create(**question | {"messages": [*HELLO, answer.choices[0].message, result]})
    wire.assert_unchanged()
    assert wire.arrived["messages"][1]["tool_calls"] == [TOOL_CALL]


def test_openai_streamed_tool_call(sdk: OpenAI, wire: Wire) -> None:
    stream = sdk.chat.completions.create(model="openai/tool-call", messages=HELLO, tools=[WEATHER_TOOL], stream=True)
    deltas = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert (deltas[0].id, deltas[0].function.name) == (TOOL_CALL["id"], "weather")
    assert json.loads("".join(delta.function.arguments for delta in deltas)) == {"city": "Paris"}
    wire.assert_unchanged()


def test_openai_stream_helper_trips_over_a_tool_call(sdk: OpenAI) -> None:
    """The server adds `"type": null` to the deltas after the first, and the helper takes that for the call's type."""
    with (
        sdk.chat.completions.stream(model="openai/tool-call", messages=HELLO, tools=[WEATHER_TOOL]) as stream,
        pytest.raises(AssertionError),
    ):
        stream.get_final_completion()


def test_openai_structured_output(sdk: OpenAI, wire: Wire) -> None:
    answer = sdk.chat.completions.parse(model="openai/structured", messages=HELLO, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Paris", degrees=21)
    wire.assert_unchanged()
    assert wire.arrived["response_format"]["json_schema"]["strict"] is True
    with sdk.chat.completions.stream(model="openai/structured", messages=HELLO, response_format=Weather) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Weather(city="Paris", degrees=21)
    wire.assert_unchanged()


def test_openai_parsed_tool_call(sdk: OpenAI, wire: Wire) -> None:
    tool = openai.pydantic_function_tool(Weather, name="weather")
    answer = sdk.chat.completions.parse(model="openai/tool-call", messages=HELLO, tools=[tool])
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Paris")
    wire.assert_unchanged()


def test_openai_images_and_files(sdk: OpenAI, wire: Wire) -> None:
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0=", "filename": "a.pdf"}},
    ]
    system = {"role": "system", "content": "Be brief.", "name": "rules"}
    sdk.chat.completions.create(model=MODELS[0], messages=[system, {"role": "user", "content": parts}])
    wire.assert_unchanged()


def test_openai_logprobs(sdk: OpenAI, wire: Wire) -> None:
    answer = sdk.chat.completions.create(model="openai/logprobs", messages=HELLO, logprobs=True, top_logprobs=1)
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.1
    wire.assert_unchanged()


def test_openai_parameters_of_the_chat_api(sdk: OpenAI, wire: Wire) -> None:
    sdk.chat.completions.create(
        model=MODELS[0],
        messages=HELLO,
        frequency_penalty=0.5,
        logit_bias={"50256": -100},
        max_completion_tokens=100,
        metadata={"team": "a"},
        modalities=["text"],
        n=2,
        prediction={"type": "content", "content": "Hello"},
        presence_penalty=-0.5,
        prompt_cache_key="k",
        reasoning_effort="low",
        safety_identifier="s",
        service_tier="flex",
        store=False,
        top_p=0.9,
        user="u",
        verbosity="low",
        web_search_options={},
    )
    wire.assert_unchanged()


@pytest.mark.parametrize("model", EMBEDDINGS)
@pytest.mark.parametrize("encoding", [None, "float", "base64"], ids=["default", "float", "base64"])
def test_openai_embeddings(sdk: OpenAI, wire: Wire, model: str, encoding: str | None) -> None:
    """Left to itself the SDK asks for base64 and decodes it."""
    asked = {} if encoding is None else {"encoding_format": encoding}
    answer = sdk.embeddings.create(model=model, input=["a text", "another"], dimensions=4, **asked)
    assert wire.arrived == wire.sent | {"model": model.partition("/")[2]}
    assert wire.arrived["encoding_format"] == (encoding or "base64")
    assert [item.index for item in answer.data] == [0, 1]
    numbers = answer.data[1].embedding
    assert isinstance(numbers, str) if encoding == "base64" else numbers == pytest.approx(vector("another", 4))


def test_openai_embeddings_of_tokens(sdk: OpenAI, wire: Wire) -> None:
    sdk.embeddings.create(model=EMBEDDINGS[0], input=[[1, 2], [3]])
    assert wire.arrived["input"] == [[1, 2], [3]]
    with pytest.raises(openai.BadRequestError, match="token arrays"):
        sdk.embeddings.create(model=EMBEDDINGS[1], input=[[1, 2], [3]])


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


@EVERY_VENDOR
@pytest.mark.parametrize("status", ERRORS)
def test_openai_raises_the_error_of_the_vendors_status(sdk: OpenAI, vendor: str, status: int) -> None:
    title = next(each.title for each in VENDORS.values() if each.name == vendor)
    with pytest.raises(ERRORS[status], match=rf"Error code: {status} - .*{title} says {status}\.") as caught:
        sdk.chat.completions.create(model=f"{vendor}/status-{status}", messages=HELLO)
    assert caught.value.status_code == status


def test_openai_raises_for_what_the_gateway_itself_refuses(sdk: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(default_headers={PROVIDER_DATA: "{}"}).chat.completions.create(model=MODELS[0], messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="nobody/gpt-4o", messages=HELLO)
    with pytest.raises(openai.BadRequestError):
        sdk.chat.completions.create(model=MODELS[0], messages=[])
    with pytest.raises(openai.PermissionDeniedError):
        sdk.completions.create(model=MODELS[0], prompt="Hello")


@pytest.mark.parametrize("fault", ["hang-up", "error-event", "garbage"])
def test_openai_raises_when_a_stream_fails(sdk: OpenAI, fault: str) -> None:
    with pytest.raises(openai.APIError):
        list(sdk.chat.completions.create(model=f"openai/{fault}", messages=HELLO, stream=True))


def test_openai_takes_a_stream_that_was_cut_for_a_short_answer(sdk: OpenAI) -> None:
    """Only the missing finish_reason tells."""
    chunks = list(sdk.chat.completions.create(model="openai/no-finish", messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.content == ""
    assert not any(chunk.choices[0].finish_reason for chunk in chunks)


# What the stock server changes, drops or refuses, and the way around


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


def test_a_callers_headers_stay_behind_unless_named_in_the_body(sdk: OpenAI, wire: Wire) -> None:
    ask, header = sdk.chat.completions.create, {"anthropic-beta": "some-beta"}
    ask(model="anthropic/any", messages=HELLO, extra_headers=header)
    assert "anthropic-beta" not in wire.vendors.seen[-1].headers
    ask(model="anthropic/any", messages=HELLO, extra_body={"extra_headers": header})
    assert wire.vendors.seen[-1].headers["anthropic-beta"] == "some-beta"
    assert "extra_headers" not in wire.arrived


def test_unknown_parameters_pass_inside_extra_body(sdk: OpenAI, wire: Wire) -> None:
    """With the SDK that is an extra_body within its own."""
    with pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model=MODELS[0], messages=HELLO, extra_body={"top_k": 3})
    sdk.chat.completions.create(model=MODELS[0], messages=HELLO, extra_body={"extra_body": {"top_k": 3}})
    assert wire.arrived["top_k"] == 3


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


# llama-stack-client


@pytest.fixture
def provider_data() -> dict:
    return json.loads(ALL_KEYS[PROVIDER_DATA])


def test_llama_stack_client(gateway: Gateway, wire: Wire, provider_data: dict) -> None:
    stack = LlamaStackClient(base_url=gateway.url, provider_data=provider_data, http_client=wire.client)
    answer = stack.chat.completions.create(model=MODELS[0], messages=HELLO, tools=[WEATHER_TOOL])
    assert answer.choices[0].message.content.endswith("You said: Hello")
    wire.assert_unchanged()
    stream = stack.chat.completions.create(model=MODELS[4], messages=HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).endswith("You said: Hello")
    wire.assert_unchanged()
    assert wire.vendors.seen[-1].vendor == "anthropic"
    answer = stack.embeddings.create(model=EMBEDDINGS[1], input="a text")
    assert answer.data[0].embedding == pytest.approx(vector("a text"))


def test_llama_stack_client_lists_the_models(gateway: Gateway, wire: Wire) -> None:
    """Without keys: with them, the vendors' own models are listed as well."""
    stack = LlamaStackClient(base_url=gateway.url, http_client=wire.client)
    assert [model.id for model in stack.models.list()] == MODELS


def test_llama_stack_client_raises_the_error_of_the_vendors_status(gateway: Gateway, wire: Wire, provider_data: dict) -> None:
    settings = {"provider_data": provider_data, "http_client": wire.client, "max_retries": 0}
    stack = LlamaStackClient(base_url=gateway.url, **settings)
    for status, error in {
        401: llama_stack_client.AuthenticationError,
        404: llama_stack_client.NotFoundError,
        429: llama_stack_client.RateLimitError,
    }.items():
        with pytest.raises(error, match=f"OpenAI says {status}"):
            stack.chat.completions.create(model=f"openai/status-{status}", messages=HELLO)


def test_llama_stack_client_of_another_minor_version_is_refused(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"X-LlamaStack-Client-Version": "0.6.0"})
    assert response.status_code == 426
    assert "0.6.0 is not compatible" in response.json()["error"]["message"]


def test_llama_stack_client_async(gateway: Gateway, wire: Wire, provider_data: dict) -> None:
    async def calls() -> None:
        settings = {"provider_data": provider_data, "http_client": wire.async_client()}
        async with AsyncLlamaStackClient(base_url=gateway.url, **settings) as stack:
            stream = await stack.chat.completions.create(model=MODELS[3], messages=HELLO, stream=True)
            words = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(words).endswith("You said: Hello")
            wire.assert_unchanged()

    asyncio.run(calls())


# LangChain


def langchain(wire: Wire, settings: dict, model: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, http_client=wire.client, max_retries=0, **settings, **more)


@EVERY_VENDOR
def test_langchain_invoke_and_stream(wire: Wire, settings: dict, vendor: str) -> None:
    llm = langchain(wire, settings, f"{vendor}/any-model", temperature=0)
    assert llm.invoke("Hello").content.endswith("You said: Hello")
    wire.assert_unchanged()
    chunks = list(llm.stream("Hello"))
    assert "".join(chunk.content for chunk in chunks).endswith("You said: Hello")
    assert any(chunk.response_metadata.get("finish_reason") == "stop" for chunk in chunks)
    wire.assert_unchanged()


def test_langchain_async(wire: Wire, settings: dict) -> None:
    async def calls() -> None:
        async with wire.async_client() as http:
            llm = langchain(wire, settings, MODELS[0], http_async_client=http)
            assert (await llm.ainvoke("Hello")).content.endswith("You said: Hello")
            assert len([chunk async for chunk in llm.astream("Hello")]) > 5
            wire.assert_unchanged()

    asyncio.run(calls())


def test_langchain_tools(wire: Wire, settings: dict) -> None:
    llm = langchain(wire, settings, "openai/tool-call").bind_tools([WEATHER_TOOL], tool_choice="weather")
    answer = llm.invoke("Hello")
    assert answer.tool_calls[0]["name"] == "weather"
    assert answer.tool_calls[0]["args"] == {"city": "Paris"}
    wire.assert_unchanged()
    llm.invoke([HumanMessage("Hello"), AIMessage("", tool_calls=answer.tool_calls), ToolMessage("21", tool_call_id="call_fake")])
    wire.assert_unchanged()


def test_langchain_streamed_tool_call(wire: Wire, settings: dict) -> None:
    first, *rest = langchain(wire, settings, "openai/tool-call").bind_tools([WEATHER_TOOL]).stream("Hello")
    assert sum(rest, first).tool_calls[0]["args"] == {"city": "Paris"}
    wire.assert_unchanged()


def test_langchain_structured_output(wire: Wire, settings: dict) -> None:
    llm = langchain(wire, settings, "openai/structured").with_structured_output(Weather)
    assert llm.invoke("Hello") == Weather(city="Paris", degrees=21)
    wire.assert_unchanged()


def test_langchain_image(wire: Wire, settings: dict) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    langchain(wire, settings, MODELS[0]).invoke([HumanMessage(parts)])
    wire.assert_unchanged()


def test_langchain_raises_the_error_of_the_vendors_status(wire: Wire, settings: dict) -> None:
    with pytest.raises(openai.RateLimitError, match="Anthropic says 429"):
        langchain(wire, settings, "anthropic/status-429").invoke("Hello")


@pytest.mark.parametrize("model", EMBEDDINGS)
def test_langchain_embeddings(wire: Wire, settings: dict, model: str) -> None:
    """It would count tokens with an encoding that it downloads, unless it is told that the length needs no check."""
    embeddings = OpenAIEmbeddings(model=model, http_client=wire.client, check_embedding_ctx_length=False, **settings)
    assert embeddings.embed_documents(["a text", "another"])[1] == pytest.approx(vector("another"))
    assert embeddings.embed_query("a text") == pytest.approx(vector("a text"))
    assert wire.arrived == wire.sent | {"model": model.partition("/")[2]}


# curl


def curl(gateway: Gateway, *arguments: str) -> str:
    """What curl prints. Raises CalledProcessError if it fails."""
    header = f"{PROVIDER_DATA}: {ALL_KEYS[PROVIDER_DATA]}"
    command = ["curl", "-sS", "--max-time", "30", "-H", header, "-H", "Content-Type: application/json", *arguments]
    environ = clean_environ("/nonexistent")
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout


def test_curl(gateway: Gateway, vendors: Vendors) -> None:
    url = f"{gateway.url}/v1/chat/completions"
    answer = json.loads(curl(gateway, url, "-d", json.dumps({"model": MODELS[0], "messages": HELLO, "temperature": 0})))
    assert answer["choices"][0]["message"]["content"].endswith("You said: Hello")
    assert vendors.seen[-1].json == {"model": "gpt-4o", "messages": HELLO, "temperature": 0}
    streamed = curl(gateway, url, "-N", "-d", json.dumps({"model": MODELS[0], "messages": HELLO, "stream": True}))
    assert streamed.count("data: {") > 5
    assert "[DONE]" not in streamed
    body = json.dumps({"model": EMBEDDINGS[0], "input": "a text"})
    assert json.loads(curl(gateway, f"{gateway.url}/v1/embeddings", "-d", body))["data"][0]["embedding"] == vector("a text")


def test_curl_sees_the_status_of_an_error(gateway: Gateway) -> None:
    body = json.dumps({"model": "openai/status-429", "messages": HELLO})
    answer, status = curl(gateway, f"{gateway.url}/v1/chat/completions", "-d", body, "-w", "\n%{http_code}").splitlines()
    assert status == "429"
    assert "OpenAI says 429" in json.loads(answer)["error"]["message"]
