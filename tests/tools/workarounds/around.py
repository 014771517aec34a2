"""What no configuration changes, and the way around it."""

import json

import httpx
from support.calls import ALL_KEYS
from support.gateway import PROVIDER_DATA

from . import Bench, Row, ask, patient


def gemini_embeddings(bench: Bench) -> Row:
    """The same model through passthrough and through the native provider."""

    def measure(model: str) -> str:
        with patient(bench.shipped) as client:
            answer = client.post("/v1/embeddings", headers=ALL_KEYS, json={"model": model, "input": "a text"})
        words = "" if answer.is_success else f": {answer.json()['error']['message']}"
        return f"{answer.status_code}{words}"

    return Row(
        "the `gemini-native` provider",
        "Gemini's embeddings lack fields that the server requires",
        measure("gemini/gemini-embedding-001"),
        measure("gemini-native/gemini-embedding-001"),
    )


def silent_close(bench: Bench) -> Row:
    """100 calls, each on the connection over which an error has just come back."""
    count = 100

    def measure(keep_alive: bool) -> str:
        lost, limits = 0, httpx.Limits(max_keepalive_connections=None if keep_alive else 0)
        with patient(bench.shipped, limits=limits) as client:
            for _ in range(count):
                ask(client, "openai/status-429")
                try:
                    ask(client)
                except httpx.TransportError:
                    lost += 1
        return f"{lost} of {count} calls after a 429 lost"

    return Row(
        "`main.py` opens a connection for each call",
        "the server closes a connection after an error without saying so",
        measure(keep_alive=True),
        measure(keep_alive=False),
    )


def list_header(bench: Bench) -> Row:
    """A header that is JSON but no object."""

    def measure(header: str) -> str:
        with patient(bench.shipped) as client:
            answer = ask(client, header={PROVIDER_DATA: header})
        return str(answer.status_code)

    return Row(
        "nothing: send a JSON object",
        "a header that is a JSON list is an error of the server's, not of the caller's",
        measure(json.dumps(["sk-fake"])),
        measure(ALL_KEYS[PROVIDER_DATA]),
    )
