"""What the stock server changes around a call: its headers, its retries, its connection. What is in bodies: test_exchanges.py."""

import httpx
import openai
import pytest
from openai import OpenAI
from support.both_ends import BothEnds
from support.calls import ALL_KEYS, HELLO, MODELS
from support.vendors import REPORTED, Vendors


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


def test_a_client_that_keeps_its_connection_survives_the_servers_closing_it(sdk: OpenAI) -> None:
    """After passing on an error the server closes the connection without announcing it."""
    for _ in range(30):
        with pytest.raises(openai.NotFoundError):
            sdk.chat.completions.create(model="openai/no-such-model", messages=HELLO)
        assert sdk.with_options(max_retries=1).chat.completions.create(model=MODELS[0], messages=HELLO).choices
