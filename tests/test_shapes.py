"""What the vendors' own shapes do to client libraries: the traps that test_exchanges.py shows in bodies, met with an SDK."""

import openai
import pytest
from openai import OpenAI
from support.calls import HELLO, WEATHER_FUNCTION, WEATHER_TOOL, Weather
from support.vendors import BESIDE, REFUSAL, SIGNATURE


def test_a_refusal_arrives_as_one_and_a_filter_raises_as_at_the_vendor(sdk: OpenAI) -> None:
    answer = sdk.chat.completions.parse(model="openai/refusal", messages=HELLO, response_format=Weather)
    assert (answer.choices[0].message.refusal, answer.choices[0].message.parsed) == (REFUSAL, None)
    stream = sdk.chat.completions.create(model="openai/refusal", messages=HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.refusal or "" for chunk in stream) == REFUSAL
    assert sdk.responses.create(model="openai/refusal", input="Hello").output_text == ""
    with pytest.raises(openai.ContentFilterFinishReasonError):
        sdk.chat.completions.parse(model="openai/content-filter", messages=HELLO, response_format=Weather)


def test_an_error_that_says_200_is_a_stream_without_an_end(sdk: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model="openai/error-200", messages=HELLO)
    assert list(sdk.chat.completions.create(model="openai/error-200", messages=HELLO, stream=True)) == []


def test_a_model_that_refuses_parallel_calls_can_be_used(sdk: OpenAI) -> None:
    """The server asks for them wherever there are tools."""
    question = {"model": "openai/o3", "input": "Hello", "tools": [WEATHER_FUNCTION]}
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.responses.create(**question)
    assert "'parallel_tool_calls' is not supported with this model" in caught.value.response.text
    assert sdk.responses.create(**question, parallel_tool_calls=None).output_text.endswith("You said: Hello")
    answer = sdk.chat.completions.create(model="openai/o3", messages=HELLO, tools=[WEATHER_TOOL])
    assert answer.choices[0].message.content.endswith("You said: Hello")


def test_gemini_refuses_what_it_does_not_know(sdk: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match='Unknown name "top_k": Cannot find field'):
        sdk.chat.completions.create(model="gemini/any", messages=HELLO, extra_body={"extra_body": {"top_k": 3}})


def test_gemini_gets_its_signature_back_inside_extra_body_alone(sdk: OpenAI) -> None:
    first = sdk.chat.completions.create(model="gemini/gemini-3", messages=HELLO, tools=[WEATHER_TOOL], extra_body={})
    assert first.choices[0].message.extra_content == SIGNATURE
    call = {"id": "call_fake", "type": "function", "function": {"name": "weather", "arguments": "{}"}, "extra_content": SIGNATURE}
    history = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_fake", "content": "21"},
    ]
    ask = {"model": "gemini/gemini-3", "tools": [WEATHER_TOOL]}
    with pytest.raises(openai.BadRequestError, match="missing a thought_signature"):
        sdk.chat.completions.create(messages=history, **ask)
    answer = sdk.chat.completions.create(messages=history, **ask, extra_body={"extra_body": {"messages": history}})
    assert answer.choices[0].message.content.endswith("You said: 21")


def test_geminis_malformed_call_raises_in_a_stream_alone(sdk: OpenAI) -> None:
    with pytest.raises(openai.APIError, match="MALFORMED_FUNCTION_CALL"):
        list(sdk.chat.completions.create(model="gemini/malformed", messages=HELLO, stream=True))
    answer = sdk.chat.completions.create(model="gemini/malformed", messages=HELLO)
    assert "MALFORMED_FUNCTION_CALL" in answer.choices[0].finish_reason
    with pytest.raises(openai.InternalServerError):
        sdk.responses.create(model="gemini/malformed", input="Hello")


def test_chunks_without_ids_are_for_chat_alone(sdk: OpenAI) -> None:
    chunks = list(sdk.chat.completions.create(model="gemini/no-id", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).endswith("You said: Hello")
    with pytest.raises(openai.InternalServerError):
        sdk.responses.create(model="gemini/no-id", input="Hello")


def test_claudes_text_beside_a_call_is_for_chat_alone(sdk: OpenAI) -> None:
    message = sdk.chat.completions.create(model="anthropic/tool-call", messages=HELLO, tools=[WEATHER_TOOL]).choices[0].message
    assert (message.content, len(message.tool_calls)) == (BESIDE, 1)
    answer = sdk.responses.create(model="anthropic/tool-call", input="Hello", tools=[WEATHER_FUNCTION])
    assert [item.type for item in answer.output] == ["function_call"]
