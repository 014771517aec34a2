"""Whatever the header and whatever the body: a call is answered, without a key or a traceback, and the next one is too."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.callers import GOOD, assert_clean
from support.calls import ALL_KEYS, CHAT, caller, chat
from support.gateway import PROVIDER_DATA, Gateway

SECRET = "sk-fake-openai-SECRET"
NAMES = ["openai_authorization", "passthrough_api_key", "passthrough_url", "gemini_api_key", "__authenticated_user", "__x"]
PARAMETERS = ["messages", "stream", "tools", "tool_choice", "response_format", "n", "timeout", "extra_body", "extra_headers"]

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(f"Bearer {SECRET}")
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.sampled_from(PARAMETERS), inner, max_size=3)
    ),
    max_leaves=8,
)
# Any bytes that an HTTP client agrees to send.
header_bytes = (
    st.binary(max_size=60)
    .filter(lambda raw: not set(raw) & set(b"\0\r\n\v\f"))
    .map(lambda raw: raw.lstrip(b" \t") + SECRET.encode())
)
header_values = header_bytes | (
    (anything | st.dictionaries(st.sampled_from(NAMES), anything)).map(lambda value: json.dumps(value).encode())
)
bodies = st.binary(max_size=60) | st.dictionaries(st.sampled_from(PARAMETERS), anything, max_size=3).map(
    lambda more: json.dumps(chat("openai/any", "Hi") | more).encode()
)


def assert_survives(gateway: Gateway, header: bytes | None, body: bytes) -> None:
    """Whatever the call, it is answered, without a traceback or a key, and the next good call is too."""
    with caller(gateway.url) as client:
        headers = {PROVIDER_DATA: header or ALL_KEYS[PROVIDER_DATA], "content-type": "application/json"}
        headers["authorization"] = f"Bearer {SECRET}"
        response = client.post(CHAT, headers=headers, content=body)
        # A call that makes sense after all, one that makes none, one without a key, and one that the server is not prepared for.
        assert response.status_code in (200, 400, 401, 500)
        if response.status_code == 500:
            assert response.json() == {"error": {"message": "Internal server error: An unexpected error occurred."}}
        assert "Traceback" not in response.text
        if SECRET.encode() not in body:
            assert SECRET not in response.text
        assert client.post(CHAT, headers=ALL_KEYS, json=GOOD).is_success
    assert SECRET not in gateway.log
    assert_clean(gateway)


def fuzz(examples: int, **more: Any) -> Any:
    """How hypothesis looks: without its database and its clock, because the gateway's pace is not what is tested."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=checks, **more)


@fuzz(25, derandomize=True)
@given(header=header_values)
def test_any_header(gateway: Gateway, header: bytes) -> None:
    assert_survives(gateway, header, json.dumps(chat("openai/any", "Hi")).encode())


@fuzz(25, derandomize=True)
@given(body=bodies)
def test_any_body(gateway: Gateway, body: bytes) -> None:
    assert_survives(gateway, None, body)


@pytest.mark.slow
@fuzz(500)
@given(header=header_values, body=bodies)
def test_any_header_with_any_body(gateway: Gateway, header: bytes, body: bytes) -> None:
    assert_survives(gateway, header, body)
