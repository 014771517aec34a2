"""Ask every model of the gateway, with your own keys: one regular call, one streaming call, and embeddings.

    uv run python main.py                                  every model whose vendor has a key in .env
    uv run python main.py "Why is the sky blue?"           with a prompt of your own
    uv run python main.py -m openai/gpt-4o -m gemini/...   only these models

Read it from top to bottom: it is the whole protocol, in the order in which a client meets it.
"""

import argparse
import json
import os
import re
import sys

import httpx
from dotenv import load_dotenv

# 1. Keys. They stay here, in .env, and travel with each call in one header. The gateway keeps none, and hands each vendor
#    its own entry and no other, so the same header serves every model.


def vendor(model: str) -> str:
    """The vendor whose key `model` needs: openai for openai-mini/gpt-4o-mini."""
    return re.split("[-/]", model)[0]


def variable(name: str) -> str:
    """The variable that holds the key of the vendor `name`."""
    return f"{name.upper()}_API_KEY"


load_dotenv()
KEYS = {name: os.environ.get(variable(name), "").strip() for name in ("openai", "gemini", "anthropic")}
provider_data = {f"{name}_authorization": f"Bearer {key}" for name, key in KEYS.items() if key}
if KEYS["gemini"]:
    provider_data["gemini_api_key"] = KEYS["gemini"]  # Gemini's embeddings take the bare key.
HEADERS = {"X-LlamaStack-Provider-Data": json.dumps(provider_data)}

PATIENCE = 300  # Seconds. Models may think for minutes.
GATEWAY = f"http://localhost:{os.environ.get('LLAMA_STACK_PORT') or 8321}"

# Embeddings models need no registration: any model of a vendor is there as provider/model.
EMBEDDINGS = ("openai/text-embedding-3-small", "gemini-native/gemini-embedding-001")


class Failure(Exception):
    """A call that did not succeed. The message is a sentence for the user."""


# 2. The models. This call carries no key: with keys in the header, the vendors' own models would be listed as well.


def list_models(client: httpx.Client) -> list[str]:
    """The ids of the chat models that the gateway has registered. Raises Failure if something else answers there."""
    response = client.get("/v1/models")
    if response.status_code == 401:
        raise Failure(f"The gateway at {GATEWAY} wants a token of your identity provider, which this sample does not send.")
    try:
        models = response.raise_for_status().json()["data"]
        return [model["id"] for model in models if model["custom_metadata"]["model_type"] == "llm"]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        raise Failure(f"What answers at {GATEWAY} is not the gateway. Is another program using its port?") from error


# 3. A regular call: one request, one answer.


def ask(client: httpx.Client, model: str, prompt: str) -> str:
    """The model's answer to `prompt`, whole. Raises Failure with what the vendor said."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    response = client.post("/v1/chat/completions", headers=HEADERS, json=body)
    check(response, model)
    return response.json()["choices"][0]["message"]["content"] or ""


# 4. A streaming call: the answer comes as server-sent events, a few words in each. A `finish_reason` says that the answer
#    is complete. An event with an `error`, or an end without a `finish_reason`, says that it was cut short.


def ask_streaming(client: httpx.Client, model: str, prompt: str) -> None:
    """Print the model's answer to `prompt` as it arrives. Raises Failure if it does not arrive whole."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}
    complete = False
    with client.stream("POST", "/v1/chat/completions", headers=HEADERS, json=body) as response:
        check(response, model)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise Failure(f"{model} broke off its answer: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
                complete = complete or bool(choice["finish_reason"])
    if not complete:
        raise Failure(f"{model} broke off its answer: the stream ended without a finish_reason.")


# 5. Embeddings: a text becomes a list of numbers.


def embed(client: httpx.Client, model: str, text: str) -> list[float]:
    """The embedding of `text`. Raises Failure with what the vendor said."""
    response = client.post("/v1/embeddings", headers=HEADERS, json={"model": model, "input": text})
    check(response, model)
    return response.json()["data"][0]["embedding"]


# 6. Errors. The gateway passes on the vendor's status code and message.


def check(response: httpx.Response, model: str) -> None:
    """Raise Failure with the gateway's or the vendor's message unless the call succeeded."""
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text
    refused = response.status_code in (401, 403) or "API key" in message
    hint = f" Check {variable(vendor(model))} in .env." if refused else ""
    raise Failure(f"{model} answered {response.status_code}: {message}{hint}")


# 7. All of it, in order.


def main() -> int:
    """Make the calls and print the answers. Returns the exit code: 0 if every call that was made succeeded."""
    parser = argparse.ArgumentParser(description="Ask the gateway's models, with the keys in .env.")
    parser.add_argument(
        "prompt", nargs="?", default="Say hello in one short sentence.", help="what to ask (default: %(default)r)"
    )
    parser.add_argument("-m", "--model", action="append", help="ask only this model; may be given more than once")
    options = parser.parse_args()
    failed = False

    def report(problem: str) -> None:
        nonlocal failed
        failed = True
        for key in filter(None, KEYS.values()):
            problem = problem.replace(key, "[key]")  # Should a vendor's message quote it.
        print(problem, file=sys.stderr, flush=True)

    if not any(KEYS.values()):
        report(f"There is no key. Copy .env.example to .env, and fill in one of {', '.join(map(variable, KEYS))} or more.")
        return 1

    # The gateway is on this machine, so no proxy may come between. It closes a connection after passing on an error, without
    # saying so: a connection of its own for each call is not caught out by that.
    settings = {"timeout": httpx.Timeout(PATIENCE, connect=5), "trust_env": False}
    try:
        with httpx.Client(base_url=GATEWAY, limits=httpx.Limits(max_keepalive_connections=0), **settings) as client:
            models = options.model or list_models(client)
            for model in models + ([] if options.model else list(EMBEDDINGS)):
                if not KEYS.get(vendor(model), "unknown to this client, so let the gateway answer"):
                    skip = f"Skipped {model}: {variable(vendor(model))} is not set in .env."
                    report(skip) if options.model else print(skip, flush=True)
                    continue
                print(f"\n== {model}", flush=True)
                try:
                    if model in EMBEDDINGS:
                        vector = embed(client, model, options.prompt)
                        print(f"embedding: {len(vector)} numbers, from {vector[:3]}", flush=True)
                        continue
                    print(f"regular:   {ask(client, model, options.prompt)}\nstreaming: ", end="", flush=True)
                    ask_streaming(client, model, options.prompt)
                    print(flush=True)
                except (Failure, httpx.ReadTimeout) as failure:
                    print(flush=True)
                    report(str(failure) if isinstance(failure, Failure) else f"{model} fell silent for {PATIENCE} seconds.")
    except Failure as failure:
        report(str(failure))
    except (httpx.ConnectError, httpx.InvalidURL):
        report(f"No gateway answers at {GATEWAY}. Start it with: make server")
    except httpx.HTTPError as error:
        report(f"The connection to the gateway at {GATEWAY} failed: {error or type(error).__name__}. Is it still running?")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # The reader of the output has left: main.py | head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
