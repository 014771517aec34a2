"""The gateway speaks to the vendors and to whom its operator has named, from its first moment to its last."""

from pathlib import Path

import pytest
from support.bare_servers import Accepts
from support.calls import ALL_KEYS, MODELS, caller, chat, responses
from support.gateway import START, Gateway
from support.vendors import Vendors


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_nobody_is_called_by_plain_http(vendors: Vendors, tmp_path: Path, name: str) -> None:
    """A proxy for plain HTTP would see who is called at the start, with each call, or in the end."""
    vendors.strangers.clear()
    with Accepts() as proxy:
        settings = {name: f"http://127.0.0.1:{proxy.port}"}
        with Gateway(tmp_path, START, **settings, **vendors.environ()) as gateway, caller(gateway.url, timeout=60) as client:
            for stream in (False, True):
                assert client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0], stream=stream)).is_success
                assert client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0], stream=stream)).is_success
            client.get("/v1/models", headers=ALL_KEYS)
        assert proxy.kept == []
    assert vendors.strangers == []


def test_what_the_operator_names_is_reached_past_the_closed_door_and_nothing_beside_it(tmp_path: Path) -> None:
    """The environment in which the server runs: its proxy is not there, and only what is named goes past it."""
    settings = {
        "OPENAI_PASSTHROUGH_URL": "http://127.0.0.1:9101/openai",
        "GEMINI_PASSTHROUGH_URL": "https://127.0.0.1:9102/v1",
        "ANTHROPIC_PASSTHROUGH_URL": "http://localhost",
        "NO_PROXY": "mcp.example.com",
        "EGRESS": "0",
    }
    environ = Gateway(tmp_path, START, **settings).environ_at_start()
    assert environ["ALL_PROXY"] == "http://127.0.0.1:9"
    assert not {"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "all_proxy", "no_proxy"} & set(environ)
    assert set(environ["NO_PROXY"].split(",")) == {
        "mcp.example.com",
        "https://api.openai.com",
        "https://generativelanguage.googleapis.com",
        "https://api.anthropic.com",
        "http://127.0.0.1:9101",
        "https://127.0.0.1:9102",
        "http://localhost",
    }


def test_an_operators_proxy_decides_about_https_and_plain_http_stays_closed(vendors: Vendors, tmp_path: Path) -> None:
    settings = {"OPENAI_PASSTHROUGH_URL": "http://127.0.0.1:9101"} | vendors.environ()
    environ = Gateway(tmp_path, START, **settings).environ_at_start()
    assert environ["HTTPS_PROXY"] == vendors.environ()["HTTPS_PROXY"]
    assert environ["ALL_PROXY"] == "http://127.0.0.1:9"
    assert environ["NO_PROXY"] == "http://127.0.0.1:9101"
