"""llama-stack-client on the running gateway: what it sends reaches the vendor, what the vendor answers reaches it."""

import asyncio
import json

import httpx
import llama_stack_client
import pytest
from llama_stack_client import AsyncLlamaStackClient, LlamaStackClient
from support.both_ends import BothEnds
from support.calls import ALL_KEYS, EMBEDDINGS, HELLO, MODELS, WEATHER_TOOL, chat
from support.gateway import PROVIDER_DATA, Gateway
from support.vendors import vector


@pytest.fixture
def settings(gateway: Gateway, ends: BothEnds) -> dict:
    data = json.loads(ALL_KEYS[PROVIDER_DATA])
    return {"base_url": gateway.url, "http_client": ends.client, "provider_data": data, "max_retries": 0}


def test_chat_and_embeddings(ends: BothEnds, settings: dict) -> None:
    stack = LlamaStackClient(**settings)
    answer = stack.chat.completions.create(model=MODELS[0], messages=HELLO, tools=[WEATHER_TOOL])
    assert answer.choices[0].message.content.endswith("You said: Hello")
    ends.assert_unchanged()
    stream = stack.chat.completions.create(model=MODELS[4], messages=HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).endswith("You said: Hello")
    ends.assert_unchanged()
    assert ends.vendors.seen[-1].vendor == "anthropic"
    answer = stack.embeddings.create(model=EMBEDDINGS[1], input="a text")
    assert answer.data[0].embedding == pytest.approx(vector("a text"))
    # Without keys: with them, the vendors' own models are listed as well.
    stack = LlamaStackClient(**settings | {"provider_data": None})
    assert [model.id for model in stack.models.list()] == MODELS


def test_raises_the_error_of_the_vendors_status(settings: dict) -> None:
    stack = LlamaStackClient(**settings)
    for status, error in {
        401: llama_stack_client.AuthenticationError,
        404: llama_stack_client.NotFoundError,
        429: llama_stack_client.RateLimitError,
    }.items():
        with pytest.raises(error, match=f"OpenAI says {status}"):
            stack.chat.completions.create(model=f"openai/status-{status}", messages=HELLO)


def test_any_release_is_let_in(client: httpx.Client) -> None:
    for release in ("0.3.0", "0.6.0", "1.0.0"):
        headers = ALL_KEYS | {"X-LlamaStack-Client-Version": release}
        answer = client.post("/v1/chat/completions", headers=headers, json=chat(MODELS[0]))
        assert answer.is_success, answer.text
        assert answer.json()["choices"][0]["message"]["content"].endswith("You said: Hello")


def test_async(ends: BothEnds, settings: dict) -> None:
    async def calls() -> None:
        async with AsyncLlamaStackClient(**settings | {"http_client": ends.async_client()}) as stack:
            stream = await stack.chat.completions.create(model=MODELS[3], messages=HELLO, stream=True)
            words = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(words).endswith("You said: Hello")
            ends.assert_unchanged()

    asyncio.run(calls())
