"""LangChain on the running gateway: what it sends reaches the vendor, what the vendor answers reaches it."""

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from support.both_ends import BothEnds
from support.calls import EMBEDDINGS, MODELS, PIXEL, WEATHER_TOOL, Weather
from support.vendors import KEYS, vector


def langchain(ends: BothEnds, settings: dict, model: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, http_client=ends.client, max_retries=0, **settings, **more)


@pytest.mark.parametrize("vendor", KEYS)
def test_invoke_and_stream(ends: BothEnds, settings: dict, vendor: str) -> None:
    llm = langchain(ends, settings, f"{vendor}/any-model", temperature=0)
    assert llm.invoke("Hello").content.endswith("You said: Hello")
    ends.assert_unchanged()
    chunks = list(llm.stream("Hello"))
    assert "".join(chunk.content for chunk in chunks).endswith("You said: Hello")
    assert any(chunk.response_metadata.get("finish_reason") == "stop" for chunk in chunks)
    ends.assert_unchanged()


def test_async(ends: BothEnds, settings: dict) -> None:
    async def calls() -> None:
        async with ends.async_client() as http:
            llm = langchain(ends, settings, MODELS[0], http_async_client=http)
            assert (await llm.ainvoke("Hello")).content.endswith("You said: Hello")
            assert len([chunk async for chunk in llm.astream("Hello")]) > 5
            ends.assert_unchanged()

    asyncio.run(calls())


def test_tools(ends: BothEnds, settings: dict) -> None:
    llm = langchain(ends, settings, "openai/tool-call").bind_tools([WEATHER_TOOL], tool_choice="weather")
    answer = llm.invoke("Hello")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"city": "Paris"})]
    ends.assert_unchanged()
    llm.invoke([HumanMessage("Hello"), AIMessage("", tool_calls=answer.tool_calls), ToolMessage("21", tool_call_id="call_fake")])
    ends.assert_unchanged()
    first, *rest = llm.stream("Hello")
    assert sum(rest, first).tool_calls[0]["args"] == {"city": "Paris"}
    ends.assert_unchanged()


def test_tools_and_a_schema_cannot_be_streamed(ends: BothEnds, settings: dict) -> None:
    """LangChain takes the SDK's helper for that, which takes the server's `"type": null` for the type of a call."""
    llm = langchain(ends, settings, "openai/tool-call").bind_tools([WEATHER_TOOL], response_format=Weather, strict=True)
    with pytest.raises(AssertionError):
        list(llm.stream("Hello"))
    assert llm.invoke("Hello").tool_calls[0]["args"] == {"city": "Paris"}


def test_structured_output_and_an_image(ends: BothEnds, settings: dict) -> None:
    llm = langchain(ends, settings, "openai/structured").with_structured_output(Weather)
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    assert llm.invoke([HumanMessage(parts)]) == Weather(city="Paris", degrees=21)
    ends.assert_unchanged()


def test_raises_the_error_of_the_vendors_status(ends: BothEnds, settings: dict) -> None:
    with pytest.raises(openai.RateLimitError, match="Anthropic says 429"):
        langchain(ends, settings, "anthropic/status-429").invoke("Hello")


@pytest.mark.parametrize("model", EMBEDDINGS)
def test_embeddings(ends: BothEnds, settings: dict, model: str) -> None:
    """It would count tokens with an encoding that it downloads, unless it is told that the length needs no check."""
    embeddings = OpenAIEmbeddings(model=model, http_client=ends.client, check_embedding_ctx_length=False, **settings)
    assert embeddings.embed_documents(["a text", "another"])[1] == pytest.approx(vector("another"))
    assert embeddings.embed_query("a text") == pytest.approx(vector("a text"))
    assert ends.arrived == ends.sent | {"model": model.partition("/")[2]}
