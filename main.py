"""Ask every model of the gateway, with your own keys: one regular call, one streaming call, and embeddings.

Read it from top to bottom: it is the whole protocol, in the order in which a client meets it.
    make client                                     every model whose vendor has a key in .env
    make client PROMPT="Why is the sky blue?"       with a prompt of your own
    make client MODEL="openai/gpt-4o gemini/..."    only these models
"""

import argparse
import ast
import json
import os
import re
import sys

import httpx
from dotenv import dotenv_values


class Failure(Exception):
    """Something did not succeed. The message is a sentence for the user."""


# 1. Keys. They stay here, in .env, and travel with each call in one header. The gateway keeps none, and hands each vendor
#    its own entry and no other, so the same header serves every model. What is exported goes before what is in .env.
try:
    for name, value in dotenv_values().items():
        exported = os.environ.get(name, "").strip()
        os.environ[name] = exported or value or ""
        if exported and value and exported != value:
            print(f"{name} has one value in .env and another in the environment: the environment's is used.", file=sys.stderr)
except (OSError, ValueError) as error:
    sys.exit(f"The file .env cannot be read: {error}")

VARIABLES = {"openai": "OPENAI_API_KEY", "gemini": "GEMINI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
KEYS = {vendor: os.environ.get(variable, "").strip() for vendor, variable in VARIABLES.items()}
provider_data = {f"{vendor}_authorization": f"Bearer {key}" for vendor, key in KEYS.items() if key}
if KEYS["gemini"]:
    provider_data["gemini_api_key"] = KEYS["gemini"]  # Gemini's embeddings take the bare key.
HEADERS = {"X-LlamaStack-Provider-Data": json.dumps(provider_data)}

# 2. The gateway. On this machine it is 127.0.0.1, because `localhost` may be ::1 and somebody else there. Where a team's
#    gateway asks who is calling, the token of the team's identity provider goes into the usual header.
GATEWAY = os.environ.get("LLAMA_STACK_BASE_URL") or f"http://127.0.0.1:{os.environ.get('LLAMA_STACK_PORT') or 8321}"
TOKEN = os.environ.get("LLAMA_STACK_API_KEY", "").strip()
PATIENCE = 300  # Seconds. Models may think for minutes.


def connect() -> httpx.Client:
    """A client of the gateway. Raises Failure where the environment makes that impossible."""
    if not any(KEYS.values()):
        raise Failure(f"There is no key. Copy .env.example to .env, and fill in at least one: {', '.join(VARIABLES.values())}.")
    for name, key in {**{VARIABLES[vendor]: key for vendor, key in KEYS.items()}, "LLAMA_STACK_API_KEY": TOKEN}.items():
        if not re.fullmatch("[!-~]*", key):
            raise Failure(f"{name} has a character in it that no key has, such as a space or a curly quote. Copy it again.")
    # No proxy may come between on this machine; elsewhere the environment's proxy and its CA (SSL_CERT_FILE) hold. Without HAProxy
    # the gateway closes a connection after an error without saying so: each call has one of its own.
    url = httpx.URL(GATEWAY.rstrip("/").removesuffix("/v1"))
    here = re.fullmatch(r"localhost|127\.[\d.]+|::1", url.host)
    headers = {"Connection": "close"} | ({"Authorization": f"Bearer {TOKEN}"} if TOKEN else {})
    patience = httpx.Timeout(PATIENCE, connect=5)
    try:
        trust = url.scheme != "https" or httpx.create_ssl_context()
        return httpx.Client(base_url=url, headers=headers, timeout=patience, trust_env=not here, verify=trust)
    except (ImportError, OSError, ValueError) as error:
        raise Failure(f"The proxy or the CA that the environment names cannot be used: {error}") from error


# 3. The models. This call carries no key: with keys in the header, the vendors' own models would be listed as well.
def list_models(client: httpx.Client) -> list[str]:
    """The ids of the chat models that the gateway has registered. Raises Failure if it is not the gateway, or closed to us."""
    response = client.get("/v1/models")
    if response.status_code == 401:
        raise Failure(f"The gateway at {GATEWAY} wants a valid token of your identity provider in LLAMA_STACK_API_KEY.")
    try:
        models = response.raise_for_status().json()["data"]
        return [model["id"] for model in models if model["custom_metadata"]["model_type"] == "llm"]
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise Failure(f"What answers at {GATEWAY} is not the gateway. Is it another program, or does it want https?") from error


# 4. A regular call: one request, one answer.
def ask(client: httpx.Client, model: str, prompt: str) -> str:
    """The model's answer to `prompt`, whole. Raises Failure with what the vendor said."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    response = client.post("/v1/chat/completions", headers=HEADERS, json=body)
    check(response, model)
    return "".join(choice["message"]["content"] or "" for choice in response.json()["choices"])


# 5. A streaming call: the answer comes as server-sent events, a few words in each. A `finish_reason` says that the answer
#    is complete. An event with an `error`, or an end without a `finish_reason`, says that it was cut short.
def ask_streaming(client: httpx.Client, model: str, prompt: str) -> None:
    """Print the model's answer to `prompt` as it arrives. Raises Failure if it does not arrive whole."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}
    complete = False
    with client.stream("POST", "/v1/chat/completions", headers=HEADERS, json=body) as response:
        check(response, model)
        for line in response.iter_lines():
            chunk = json.loads(line[6:]) if line.startswith("data: {") else {}
            if "error" in chunk:
                raise Failure(f"{model} broke off its answer: {words(line[6:])}")
            for choice in chunk.get("choices", []):
                print(choice["delta"].get("content") or "", end="", flush=True)
                complete = complete or bool(choice["finish_reason"])
    if not complete:
        raise Failure(f"{model} broke off its answer: the stream ended without a finish_reason.")


# 6. Embeddings: a text becomes a list of numbers. Like any model of a vendor, these work without being listed.
EMBEDDINGS = ["openai/text-embedding-3-small", "gemini-native/gemini-embedding-001"]


def embed(client: httpx.Client, model: str, text: str) -> list[float]:
    """The embedding of `text`. Raises Failure with what the vendor said."""
    response = client.post("/v1/embeddings", headers=HEADERS, json={"model": model, "input": text})
    check(response, model)
    return response.json()["data"][0]["embedding"]


# 7. Errors. The gateway passes on the vendor's status, and in its message the vendor's own error as Python writes it:
#    Error code: 401 - {'error': {'message': ...}}, in a list from Google.
def words(answer: str) -> str:
    """What the vendor, or else the gateway, says to a person in an error answer."""
    try:
        answer = json.loads(answer)["error"]["message"]
        error = ast.literal_eval(answer.removeprefix("Error code: ").partition(" - ")[2])
        return (error[0] if isinstance(error, list) else error)["error"]["message"]
    except (AttributeError, LookupError, SyntaxError, TypeError, ValueError):
        return answer


def check(response: httpx.Response, model: str) -> None:
    """Raise Failure with the vendor's or the gateway's message unless the call succeeded."""
    if response.is_error:
        raise Failure(f"{model} answered {response.status_code}: {words(response.read().decode(errors='replace'))}")


# 8. All of it, in order.
def main() -> int:
    """Make the calls and print the answers. Returns the exit code: 0 if every call that was made succeeded."""
    parser = argparse.ArgumentParser(description="Ask the gateway's models, with the keys in .env.")
    parser.add_argument("prompt", nargs="?", default="Say hello in one short sentence.", help="what to ask (%(default)r)")
    parser.add_argument("-m", "--model", action="append", help="ask only this model; may be given more than once")
    options = parser.parse_args()
    refused, failed = set(), False

    def report(problem: str) -> None:
        nonlocal failed
        failed = True
        for secret in filter(None, [*KEYS.values(), TOKEN]):
            problem = problem.replace(secret, "[key]")  # Should a vendor's message quote it.
        print(problem, file=sys.stderr, flush=True)

    try:
        with connect() as client:
            listed = list_models(client)
            for model in options.model or listed + EMBEDDINGS:
                vendor = re.split("[-/]", model)[0]  # openai for openai-mini/gpt-4o-mini
                if "/" not in model:
                    report(f"{model}: models are named provider/model, such as openai/gpt-4o.")
                elif not KEYS.get(vendor, "unknown to this client, so let the gateway answer"):
                    skipped = f"Skipped {model}: {VARIABLES[vendor]} is not set in .env."
                    report(skipped) if options.model else print(skipped, flush=True)
                elif vendor not in refused:
                    print(f"\n== {model}", flush=True)
                    try:
                        if "embedding" in model:
                            vector = embed(client, model, options.prompt)
                            print(f"embedding: {len(vector)} numbers, from {vector[:3]}", flush=True)
                        else:
                            print(f"regular:   {ask(client, model, options.prompt)}\nstreaming: ", end="", flush=True)
                            ask_streaming(client, model, options.prompt)
                            print(flush=True)
                    except (Failure, httpx.ReadTimeout) as error:
                        print(flush=True)
                        problem = str(error) if isinstance(error, Failure) else f"{model} fell silent for {PATIENCE} seconds."
                        if " 401: " in problem or "API key" in problem:
                            problem += f" Check {VARIABLES.get(vendor, 'the key')} in .env."
                            refused.add(vendor)  # Its other models would say the same.
                        report(problem)
    except Failure as failure:
        report(str(failure))
    except (httpx.HTTPError, httpx.InvalidURL, OverflowError) as error:
        hint = "Start it with make server, and check LLAMA_STACK_PORT. If it speaks TLS, set LLAMA_STACK_BASE_URL=https://..."
        if os.environ.get("LLAMA_STACK_BASE_URL"):
            hint = "Check LLAMA_STACK_BASE_URL (http or https?), and SSL_CERT_FILE if its CA is a private one."
        report(f"No gateway answers at {GATEWAY}: {str(error).rstrip('.')}. {hint}")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(file=sys.stderr)  # So that the shell's prompt has a line of its own.
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)  # The reader of the output has left: main.py | head.
