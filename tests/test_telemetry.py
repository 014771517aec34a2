"""What a collector is sent: metrics and traces, and nothing that a caller wrote, however malformed the call."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.calls import ALL_KEYS, MALFORMED, MODELS, SECRET, caller, chat
from support.gateway import START, Gateway, eventually
from support.services import Services
from support.vendors import KEYS, Vendors

PROMPT = "a prompt that no collector sees"


@pytest.fixture(scope="module")
def gateway(vendors: Vendors, services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with a collector, which exports twice a second."""
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": services.url,
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
        "OTEL_BSP_SCHEDULE_DELAY": "500",
        "OTEL_BLRP_SCHEDULE_DELAY": "500",
    }
    with Gateway(tmp_path_factory.mktemp("telemetry"), START, **settings, **vendors.environ()) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with caller(gateway.url, timeout=120) as client:
        yield client


def exported_after(client: httpx.Client, services: Services, name: str) -> bytes:
    """All that was exported until a call that comes now is in the metrics and in the traces."""
    model, before = f"openai/{name}", len(services.spans())
    assert client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(model, stream=True)).is_success

    def seen() -> bool:
        points = services.metrics().get("llama_stack.inference.time_to_first_token_seconds", [])
        return len(services.spans()) > before and any(point["model"] == model for point in points)

    assert eventually(seen, 60)
    return b"".join(body for _, body in services.received)


def test_malformed_calls_leave_nothing_in_any_signal(client: httpx.Client, services: Services) -> None:
    """A key with a stray space makes httpx raise an error that quotes it, tools and temperatures make pydantic do so."""
    stray = {"X-LlamaStack-Provider-Data": f'{{"openai_authorization": "Bearer {SECRET} "}}'}
    client.post("/v1/chat/completions", headers=stray, json=chat(MODELS[0], PROMPT))
    client.post("/v1/responses", headers=stray, json={"model": MODELS[0], "input": PROMPT})
    for call in MALFORMED:
        if SECRET not in call["json"]["model"]:  # The model's name is a label, as whoever sends it can know.
            client.post("/v1/chat/completions", **call)
    client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat("openai/status-401", PROMPT))
    client.post("/v1/responses", headers=ALL_KEYS, json={"model": MODELS[0], "input": PROMPT, "tools": [{"type": SECRET}]})
    exported = exported_after(client, services, "after-malformed-calls")
    for secret in (SECRET, PROMPT, "says 401", *KEYS.values()):
        assert secret.encode() not in exported
    assert {path for path, _ in services.received} == {"/v1/metrics", "/v1/traces"}


def test_what_follows_the_question_mark_of_a_url_is_not_traced(client: httpx.Client, services: Services) -> None:
    client.get("/v1/models?key=sk-fake-in-a-url")
    exported = exported_after(client, services, "after-a-url")
    assert b"sk-f" not in exported


def test_model_names_that_callers_make_up_do_not_stop_the_export(client: httpx.Client, services: Services) -> None:
    """They are labels of metrics. Each is sent once, and then forgotten."""
    for number in range(20):
        client.post("/v1/chat/completions", json=chat(f"openai/{number}-{'x' * 200_000}"))
    exported_after(client, services, "after-the-long-names")
    before = sum(len(body) for _, body in services.received)
    exported_after(client, services, "once-more")
    exported_after(client, services, "and-again")
    assert sum(len(body) for _, body in services.received) - before < 1_000_000, "the long names are sent again and again"


def test_a_collector_that_is_down_is_told_once_and_stops_no_call(vendors: Vendors, tmp_path: Path) -> None:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRIC_EXPORT_INTERVAL": "500"}
    with Gateway(tmp_path, START, **settings, **vendors.environ()) as gateway, caller(gateway.url) as client:
        for _ in range(5):
            assert client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0])).is_success
    assert gateway.log.count("Nothing answers at http://localhost:9.") == 1
    assert "Warning" not in gateway.log
