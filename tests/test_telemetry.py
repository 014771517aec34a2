"""What a collector is sent: numbers, and of what callers wrote what is said here, however malformed the call.

Metrics alone, unless the operator asks for traces with OpenTelemetry's own variable.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.calls import ALL_KEYS, CHAT, MALFORMED, MODELS, SECRET, caller, chat, responses
from support.gateway import ALONE, PROVIDER_DATA, Gateway, wait_for
from support.services import Services
from support.vendors import KEYS, Vendors

FIRST_TOKEN = "llama_stack.inference.time_to_first_token_seconds"

# The labels of all metrics. But for a model's name, callers do not choose what is in them.
LABELS = {
    *("api", "method", "status", "status_code", "provider", "stream", "operation", "parameter"),
    *("url.scheme", "http.request.method", "http.route", "network.protocol.version", "http.response.status_code", "error.type"),
    *("service.name", "service.instance.id", "telemetry.sdk.language", "telemetry.sdk.name", "telemetry.sdk.version"),
    "telemetry.auto.version",
}


@pytest.fixture(scope="module", params=["metrics", "traces too"])
def exporting(
    request: pytest.FixtureRequest, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Gateway, Services]]:
    """A gateway and its collector, to which it exports twice a second."""
    settings = {"OTEL_TRACES_EXPORTER": "otlp"} if request.param == "traces too" else {}
    settings |= {"OTEL_METRIC_EXPORT_INTERVAL": "500", "OTEL_BSP_SCHEDULE_DELAY": "500", "OTEL_BLRP_SCHEDULE_DELAY": "500"}
    with Services() as services:
        settings |= {"OTEL_EXPORTER_OTLP_ENDPOINT": services.url}
        with Gateway(tmp_path_factory.mktemp("telemetry"), **settings, **ALONE, **vendors.environ()) as gateway:
            yield gateway, services


@pytest.fixture
def client(exporting: tuple[Gateway, Services]) -> Iterator[httpx.Client]:
    with caller(exporting[0].url, timeout=120) as client:
        yield client


@pytest.fixture
def services(exporting: tuple[Gateway, Services]) -> Services:
    return exporting[1]


@pytest.fixture
def traced(exporting: tuple[Gateway, Services]) -> bool:
    return "OTEL_TRACES_EXPORTER" in exporting[0].settings


def exported_after(client: httpx.Client, services: Services, name: str) -> str:
    """All that was exported until a call that comes now is in the metrics, and in the traces if there are any."""
    model, before = f"openai/{name}", len(services.spans())
    assert client.post(CHAT, headers=ALL_KEYS, json=chat(model, stream=True)).is_success
    wait_for(lambda: any(point["model"] == model for point in services.metrics().get(FIRST_TOKEN, [])), seen=services.metrics)
    if before:
        wait_for(lambda: len(services.spans()) > before)
    return b"".join(body for _, body in services.received).decode(errors="replace")


def test_of_what_callers_write_little_is_exported(client: httpx.Client, services: Services, traced: bool) -> None:
    """Everything that is sent is marked. A key with a stray space makes httpx raise an error that quotes it."""
    stray = {PROVIDER_DATA: json.dumps({"openai_authorization": "Bearer caller-key "})}
    headers = ALL_KEYS | {"X-Any": "caller-header", "User-Agent": "caller-agent", "Baggage": "x=caller-baggage"}
    headers |= {"Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "Tracestate": "x=caller-tracestate"}
    for header in (stray, headers):
        for model in (MODELS[0], "openai/status-401"):
            client.post(CHAT, headers=header, json=chat(model, "caller-prompt", user="caller-user"))
            client.post(
                "/v1/responses", headers=header, json=responses(model, "caller-prompt", metadata={"x": "caller-metadata"})
            )
    for call in MALFORMED:
        if SECRET not in call["json"]["model"]:
            client.post(CHAT, **call)
    mcp = {"type": "mcp", "server_label": "caller-label", "server_url": "http://127.0.0.1:9/caller-mcp?caller-mcp-query"}
    client.post("/v1/responses", headers=headers, json=responses(MODELS[0], "caller-prompt", tools=[mcp]))
    client.post("/v1/embeddings", headers=headers, json={"model": "openai/any", "input": "caller-input"})
    client.get("/v1/models/caller-path?key=caller-query", headers={"Host": "caller-host"})
    client.request("CALLER-VERB", "/v1/models")
    exported = exported_after(client, services, "after-all")
    assert {path for path, _ in services.received} == ({"/v1/metrics", "/v1/traces"} if traced else {"/v1/metrics"})
    found = {word.lower() for word in re.findall(r"caller-[a-z]+(?:-query)?|CALLER-VERB", exported)}
    in_spans = {f"caller-{part}" for part in ("path", "query", "host", "verb", "tracestate", "mcp", "mcp-query", "label")}
    assert found == (in_spans if traced else set())
    for secret in (SECRET, "says 401", "stand-in for", *KEYS.values()):
        assert secret not in exported


def test_labels_are_the_servers_but_for_names_of_models(client: httpx.Client, services: Services) -> None:
    """And of vector stores, which nobody has here: a call that names one all the same finds its name in `vector_db`."""
    exported_after(client, services, "after-nothing")
    labels = {name for points in services.metrics().values() for point in points for name in point} - {"value"}
    assert labels - LABELS == {"model"}
    assert {point["service.instance.id"] for points in services.metrics().values() for point in points} - {""}


def test_spans_say_what_was_called(
    client: httpx.Client, services: Services, exporting: tuple[Gateway, Services], traced: bool
) -> None:
    client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0]))
    exported_after(client, services, "after-a-call")
    assert ("POST /v1/chat/completions" in services.spans()) == traced
    assert ("Traces are exported: what callers write into URLs" in exporting[0].log) == traced


@pytest.mark.parametrize("exporting", ["metrics"], indirect=True)
def test_model_names_that_callers_make_up_do_not_stop_the_export(client: httpx.Client, services: Services) -> None:
    """They are labels of metrics. Each is sent once, and then forgotten."""
    for number in range(20):
        client.post(CHAT, json=chat(f"openai/{number}-{'x' * 200_000}"))
    exported_after(client, services, "after-the-long-names")
    before = sum(len(body) for _, body in services.received)
    exported_after(client, services, "once-more")
    exported_after(client, services, "and-again")
    assert sum(len(body) for _, body in services.received) - before < 1_000_000, "the long names are sent again and again"


def test_a_collector_that_is_down_is_told_once_and_stops_no_call(vendors: Vendors, tmp_path: Path) -> None:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRIC_EXPORT_INTERVAL": "500"}
    with Gateway(tmp_path, **settings, **ALONE, **vendors.environ()) as gateway, caller(gateway.url) as client:
        for _ in range(5):
            assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0])).is_success
    assert gateway.log.count("Calls to localhost will fail: the connection was refused.") == 1
    assert "Warning" not in gateway.log


def test_what_the_operator_chooses_is_kept_but_for_logs(tmp_path: Path) -> None:
    """Logs quote keys and prompts."""
    usual = {
        "OTEL_SERVICE_NAME": "lls-openai",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
    }
    own = {"OTEL_SERVICE_NAME": "ours", "OTEL_TRACES_EXPORTER": "otlp", "OTEL_LOGS_EXPORTER": "otlp"}
    for settings, expected in (({}, usual), (own, usual | own | {"OTEL_LOGS_EXPORTER": "none"})):
        collector = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.example:4318"}
        environ = Gateway(tmp_path, **settings, **collector, **ALONE).environ_at_start()
        assert {name: value for name, value in environ.items() if name.startswith("OTEL_")} == expected | collector
