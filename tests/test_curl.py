"""curl on the running gateway."""

import json
import subprocess

from support.calls import ALL_KEYS, EMBEDDINGS, HELLO, MODELS
from support.gateway import PROVIDER_DATA, Gateway, clean_environ
from support.vendors import Vendors, vector


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
