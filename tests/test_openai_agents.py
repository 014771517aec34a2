"""The OpenAI Agents SDK on the running gateway: an agent with a tool, by the Responses API and by Chat."""

import asyncio

import pytest
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, RunConfig, Runner, function_tool
from openai import AsyncOpenAI
from support.both_ends import BothEnds
from support.calls import MODELS
from support.vendors import KEYS

# It would send traces of its own to OpenAI.
QUIET = RunConfig(tracing_disabled=True)


def run(ends: BothEnds, settings: dict, kind: type, name: str, stream: bool = False) -> tuple[str, list[str]]:
    """What an agent with a tool answers to "Hello", and the cities that its tool was asked about."""
    asked: list[str] = []

    @function_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return f"21 degrees in {city}"

    async def answer() -> str:
        async with AsyncOpenAI(**settings, http_client=ends.async_client(), max_retries=0) as sdk:
            agent = Agent(name="forecaster", instructions="Be brief.", tools=[weather], model=kind(name, sdk))
            if stream:
                result = Runner.run_streamed(agent, "Hello", run_config=QUIET)
                assert [event async for event in result.stream_events()]
            else:
                result = await Runner.run(agent, "Hello", run_config=QUIET)
            return result.final_output

    return asyncio.run(answer()), asked


@pytest.mark.parametrize("vendor", KEYS)
@pytest.mark.parametrize("stream", [False, True], ids=["regular", "stream"])
@pytest.mark.parametrize("kind", [OpenAIResponsesModel, OpenAIChatCompletionsModel], ids=["responses", "chat"])
def test_an_agent_uses_its_tool(ends: BothEnds, settings: dict, kind: type, stream: bool, vendor: str) -> None:
    answer, asked = run(ends, settings, kind, f"{vendor}/tool-call", stream)
    assert asked == ["Paris"]
    assert answer.endswith("You said: 21 degrees in Paris")
    roles = [message["role"] for message in ends.arrived["messages"]]
    assert roles == ["system", "user", "assistant", "tool"]
    assert {request.url.path for request in ends.requests} == {
        "/v1/responses" if kind is OpenAIResponsesModel else "/v1/chat/completions"
    }


@pytest.mark.parametrize("stream", [False, True], ids=["regular", "stream"])
def test_an_agent_uses_two_tools_at_once(ends: BothEnds, settings: dict, stream: bool) -> None:
    answer, asked = run(ends, settings, OpenAIResponsesModel, "openai/tool-calls", stream)
    assert sorted(asked) == ["Paris", "Rome"]
    assert answer.endswith("You said: 21 degrees in Rome")


def test_an_agent_without_a_tool(ends: BothEnds, settings: dict) -> None:
    assert run(ends, settings, OpenAIResponsesModel, MODELS[4])[0].endswith("You said: Hello")
