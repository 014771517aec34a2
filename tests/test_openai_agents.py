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
@pytest.mark.parametrize(
    ("kind", "path"),
    [(OpenAIResponsesModel, "/v1/responses"), (OpenAIChatCompletionsModel, "/v1/chat/completions")],
    ids=["responses", "chat"],
)
def test_an_agent_uses_its_tool(ends: BothEnds, settings: dict, kind: type, path: str, vendor: str) -> None:
    for stream in (False, True):
        answer, asked = run(ends, settings, kind, f"{vendor}/tool-call", stream)
        assert asked == ["Paris"]
        assert answer.endswith("You said: 21 degrees in Paris")
        assert [message["role"] for message in ends.arrived["messages"]] == ["system", "user", "assistant", "tool"]
        assert {request.url.path for request in ends.requests} == {path}


def test_an_agent_uses_two_tools_at_once_and_none(ends: BothEnds, settings: dict) -> None:
    for stream in (False, True):
        answer, asked = run(ends, settings, OpenAIResponsesModel, "openai/tool-calls", stream)
        assert sorted(asked) == ["Paris", "Rome"]
        assert answer.endswith("You said: 21 degrees in Rome")
    assert run(ends, settings, OpenAIResponsesModel, MODELS[4])[0].endswith("You said: Hello")


@pytest.mark.parametrize(
    ("kind", "cities"), [(OpenAIResponsesModel, []), (OpenAIChatCompletionsModel, ["Paris", "Rome"])], ids=["responses", "chat"]
)
def test_an_agent_gets_geminis_parallel_calls_by_chat_alone(
    ends: BothEnds, settings: dict, kind: type, cities: list[str]
) -> None:
    assert sorted(run(ends, settings, kind, "gemini/tool-calls")[1]) == cities
