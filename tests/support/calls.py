"""What callers send and what they read: models, headers, bodies, and the parts of an answer."""

import itertools
import json
import time
from typing import Any

import httpx
import yaml
from pydantic import BaseModel, Field

from .gateway import PROJECT, PROVIDER_DATA, Gateway
from .vendors import KEYS

CHAT = "/v1/chat/completions"
RUN_YAML = yaml.safe_load((PROJECT / "run.yaml").read_text())
MODELS = [model["model_id"] for model in RUN_YAML["registered_resources"]["models"]]

# How callers connect: for each call anew, because the server closes a connection after an error without announcing it.
CONNECTIONS = {"trust_env": False, "limits": httpx.Limits(max_keepalive_connections=0), "verify": Gateway.trust}

# The two embeddings models that users are promised, by the provider that serves them.
EMBEDDINGS = ["openai/text-embedding-3-small", "gemini-native/gemini-embedding-001"]

# One header for every model.
ALL_KEYS = {
    PROVIDER_DATA: json.dumps(
        {f"{vendor}_authorization": f"Bearer {key}" for vendor, key in KEYS.items()} | {"gemini_api_key": KEYS["gemini"]}
    )
}


WRONG_KEY = {PROVIDER_DATA: json.dumps({"openai_authorization": "Bearer sk-fake-wrong"})}


def vendor_of(model: str) -> str:
    """The vendor behind a model: openai for openai-mini/gpt-4o-mini."""
    return model.replace("-", "/").split("/")[0]


def one_key(model: str) -> dict[str, str]:
    """The older form of the header: the key for this one call, and a URL that is ignored."""
    return {
        PROVIDER_DATA: json.dumps({"passthrough_api_key": KEYS[vendor_of(model)], "passthrough_url": "https://api.openai.com"})
    }


def chat(model: str, prompt: str = "Hello", **more: object) -> dict:
    """The body of a chat call."""
    return {"model": model, "messages": [{"role": "user", "content": prompt}]} | more


HELLO = [{"role": "user", "content": "Hello"}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Weather(BaseModel):
    """The weather in a city."""

    city: str = Field(description="Its name")
    degrees: int = 0


WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"type": ["string", "null"], "enum": ["C", "F", None]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "strict": True,
}
# As Chat has it, and as Responses has it.
WEATHER_TOOL = {"type": "function", "function": WEATHER}
WEATHER_FUNCTION = {"type": "function"} | WEATHER


def responses(model: str, prompt: str | list = "Hello", **more: object) -> dict:
    """The body of a call of the Responses API."""
    return {"model": model, "input": prompt} | more


# Calls that the server complains about, each with SECRET in it.
SECRET = "sk-fake-hidden"
MALFORMED = [
    {"json": {"model": MODELS[0], "messages": SECRET}, "headers": ALL_KEYS},
    {"json": chat(SECRET), "headers": ALL_KEYS},
    {"json": chat(MODELS[0], tools=[{"type": SECRET}]), "headers": ALL_KEYS},
    {"json": chat(MODELS[0], temperature=SECRET), "headers": ALL_KEYS},
    {"json": chat(MODELS[0], **{SECRET: 1}), "headers": ALL_KEYS},
    {"json": chat(MODELS[0]), "headers": {PROVIDER_DATA: json.dumps({"passthrough_api_key": [SECRET]})}},
    {"json": chat(MODELS[0]), "headers": {PROVIDER_DATA: json.dumps({"passthrough_url": SECRET})}},
    {"json": chat(MODELS[0]), "headers": {PROVIDER_DATA: SECRET}},
    {"json": chat("gemini-native/x"), "headers": {PROVIDER_DATA: json.dumps({"gemini_api_key": {"a": SECRET}})}},
]


def events(response: httpx.Response) -> list[dict]:
    """The server-sent events of a streamed answer, without a closing [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def streamed_text(response: httpx.Response) -> str:
    """The text of a streamed answer."""
    return "".join(choice["delta"]["content"] or "" for event in events(response) for choice in event["choices"])


def finished(response: httpx.Response) -> bool:
    """Whether a streamed answer says that it is complete."""
    return any(choice["finish_reason"] for event in events(response) for choice in event.get("choices", []))


def output_text(response: httpx.Response) -> str:
    """The text of an answer of the Responses API."""
    items = [item for item in response.json()["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in items for part in item["content"])


def message(response: httpx.Response) -> str:
    """The message of an error answer, in the one shape that OpenAI clients read."""
    return response.json()["error"]["message"]


def caller(url: str, **settings: Any) -> httpx.Client:
    """An HTTP client of a gateway that sends no key unless a call adds one."""
    return httpx.Client(base_url=url, **CONNECTIONS | {"timeout": 60} | settings)


def arrivals(client: httpx.Client, model: str, prompt: str = "Hello") -> list[float]:
    """When each event of a streamed answer arrived, on `time.monotonic`."""
    arrived = []
    with client.stream("POST", "/v1/chat/completions", headers=ALL_KEYS, json=chat(model, prompt, stream=True)) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                arrived.append(time.monotonic())
    return arrived


def one_by_one(client: httpx.Client) -> bool:
    """Whether most words of a stream arrive alone, where one is sent every 0.1 s.

    Of what waits for more to come, Linux hands over some words at a time, every 0.2 s. Source: tcp(7), TCP_CORK.
    """
    arrived = arrivals(client, "openai/every-0.1", "one two three four five six seven eight nine ten")
    gaps = [later - sooner for sooner, later in itertools.pairwise(arrived)]
    return arrived[-1] - arrived[0] > 1 and sum(gap > 0.03 for gap in gaps) > len(gaps) / 2
