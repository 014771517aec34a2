"""Who may call, and whose name a call carries."""

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from support.calls import CHAT, MODELS, SECRET
from support.gateway import HAPROXY, PROJECT, Gateway, listening

from . import Bench, Edit, Row, Skipped, ask, patient


def other_routes(bench: Bench) -> Row:
    """Every route of the server's own description, called without a key."""
    config = (PROJECT / "run.yaml").read_text()
    policy = config[config.index("  auth:\n") :]

    def measure(gateway: Gateway) -> str:
        prompt = {"prompt": f"Remember {SECRET}", "variables": []}
        with patient(gateway) as client:
            paths = client.get("/openapi.json").json()["paths"]
            routes = [(verb.upper(), path) for path, verbs in paths.items() for verb in verbs]
            answers = [client.request(verb, re.sub(r"\{.*?\}", "x", path), json={}).status_code for verb, path in routes]
            client.post("/v1/prompts", json=prompt)
            kept = client.get("/v1/prompts").text.count(SECRET)
        return (
            f"{sum(code != 403 for code in answers)} of {len(routes)} routes open, {kept} of 1 stored prompt readable by another"
        )

    return bench.compare(
        "`route_policy`: what is not listed is refused",
        "prompts, conversations, connectors and admin are open, and keep what they are sent",
        measure,
        Edit("run.yaml", policy, ""),
    )


def every_interface(bench: Bench) -> Row:
    """The addresses of the listening sockets."""

    def measure(gateway: Gateway) -> str:
        names = {"0100007F": "127.0.0.1", "00000000": "0.0.0.0 (every interface)", "0" * 32: ":: (every interface)"}
        return "listens on " + ", ".join(names.get(address, address) for address in listening(gateway.port))

    host = Edit("run.yaml", "  host: ${env.LLAMA_STACK_HOST:=127.0.0.1}\n", "")
    return bench.compare("`server.host`", "the server listens on every interface", measure, host)


def server_organization(bench: Bench) -> Row:
    """OPENAI_ORG_ID in the server's environment, and a caller with keys of its own."""

    def measure(gateway: Gateway) -> str:
        bench.vendors.seen.clear()
        with patient(gateway) as client:
            for model in [*MODELS, "gemini-native/gemini-2.5-flash"]:
                ask(client, model).raise_for_status()
        told = sorted({call.vendor for call in bench.vendors.seen if call.headers.get("openai-organization")})
        return f"sent to {', '.join(told) or 'nobody'}"

    return bench.compare(
        "no `OPENAI_ORG_ID` and `OPENAI_PROJECT_ID` from the server's environment",
        "they go out with every caller's call, to every vendor",
        measure,
        Edit("deploy/start/environment.py", 'name.startswith(("OPENAI_", *told))', "name.startswith(told)"),
    )


def keyless_calls(bench: Bench) -> Row:
    """A call without a key whose messages are all wrong, and a good one a tenth of a second later."""
    messages = 100_000

    def measure(gateway: Gateway) -> str:
        with patient(gateway) as client, ThreadPoolExecutor(1) as other:
            wrong = other.submit(client.post, CHAT, json={"model": MODELS[0], "messages": [1] * messages})
            time.sleep(0.1)
            start = time.monotonic()
            ask(client).raise_for_status()
            took = time.monotonic() - start
            return f"{wrong.result().status_code}, and a good call beside it takes {took:.2f} s"

    return at_the_front(
        bench,
        "the front: no call without a key",
        f"the server lists each error of a call before it asks for a key ({messages:,} wrong messages, 300 KB)",
        measure,
    )


def rebound_names(bench: Bench) -> Row:
    """A call that says, as a browser does, which name led to this address."""

    def measure(gateway: Gateway) -> str:
        with patient(gateway) as client:
            return f"it is answered {client.get('/v1/models', headers={'Host': 'rebound.example'}).status_code}"

    return at_the_front(
        bench,
        "the front: known names in `Host`",
        "a page that leads its own name to this address calls as if it were from here (DNS rebinding)",
        measure,
    )


def at_the_front(bench: Bench, does: str, trap: str, measure: Callable[[Gateway], str]) -> Row:
    """The row of what the front does: without it, and with it."""
    if not HAPROXY:
        raise Skipped("HAProxy is not installed.")
    with bench.gateway(FRONT="1") as gateway:
        return Row(does, trap, measure(bench.shipped), measure(gateway))
