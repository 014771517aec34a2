"""What the server is given: whom it can reach, and nothing that would speak for a caller.

Its environment is read from a start that ends at once; that it heeds it is seen where it runs.
"""

import os
from pathlib import Path

import pytest
import trustme
import yaml
from support.bare_servers import Accepts
from support.calls import ALL_KEYS, CHAT, MODELS, RUN_YAML, caller, chat, responses
from support.gateway import ALONE, HAPROXY, PROJECT, Gateway
from support.vendors import VENDORS, Vendors

HASHED_CAS = [Path("/etc/ssl/certs"), Path("/etc/pki/ca-trust/extracted/pem/directory-hash")]
CLOSED_DOOR = "http://127.0.0.1:9"

# What the server, or what it is made of, would send to vendors or tell others by itself.
NOT_THE_SERVERS = [
    *("OPENAI_API_KEY", "GEMINI_API_KEY", "ANTHROPIC_API_KEY", "GROQ_API_KEY", "LLAMA_STACK_API_KEY"),
    *("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS", "OPENAI_BASE_URL", "OPENAI_WEBHOOK_SECRET", "OPENAI_LOG"),
    *(
        "OTEL_CONFIG_FILE",
        "OTEL_EXPERIMENTAL_CONFIG_FILE",
        "OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST",
        "FASTAPI_OTEL_AUTO_CONFIGURE",
    ),
    *("HTTP_PROXY", "http_proxy"),
]


def test_what_would_speak_for_a_caller_is_not_given_to_the_server(tmp_path: Path) -> None:
    environ = Gateway(tmp_path, **dict.fromkeys(NOT_THE_SERVERS, "fake"), TZ="UTC", **ALONE).environ_at_start()
    assert not environ.keys() & {*NOT_THE_SERVERS}
    assert environ["TZ"] == "UTC"
    # What makes a wrong key cost 4 s, what lets in clients of one release alone, and what believes every caller about its address.
    assert environ["LLAMA_STACK_LOG_FORMAT"] == "json"
    assert environ["LLAMA_STACK_DISABLE_VERSION_CHECK"] == "1"
    assert environ["FORWARDED_ALLOW_IPS"] == ""


def test_the_systems_folder_of_cas_is_used_unless_the_operator_names_others(tmp_path: Path) -> None:
    """A bundle of CAs is loaded whole for every call, a folder of hashed ones is not."""
    hashed = [str(folder) for folder in HASHED_CAS if any(folder.glob("*.0"))]
    assert Gateway(tmp_path, **ALONE).environ_at_start().get("SSL_CERT_DIR") == (hashed[0] if hashed else None)
    for own in ({"SSL_CERT_DIR": str(tmp_path)}, {"SSL_CERT_FILE": "/dev/null"}):
        environ = Gateway(tmp_path, FORWARDED_ALLOW_IPS="10.0.0.1", **own, **ALONE).environ_at_start()
        assert {name: value for name, value in environ.items() if name.startswith("SSL_")} == own
        assert environ["FORWARDED_ALLOW_IPS"] == "10.0.0.1"


def reached(tmp_path: Path, **settings: str) -> dict[str, str]:
    """What of the server's environment decides whom it can reach."""
    environ = Gateway(tmp_path, **settings).environ_at_start()
    return {name: value for name, value in environ.items() if name.upper().endswith("_PROXY")}


def test_the_vendors_and_whom_the_operator_names_are_reached_and_nobody_else(tmp_path: Path) -> None:
    """A call can name the URL of an MCP server, say. All goes to a port where nobody listens, but for these."""
    found = reached(
        tmp_path,
        OPENAI_PASSTHROUGH_URL="http://127.0.0.1:9101/openai",
        GEMINI_PASSTHROUGH_URL="https://ann:secret@[::1]:9102/v1beta",
        ANTHROPIC_PASSTHROUGH_URL="http://localhost",
        AUTH_JWKS_URI="https://id.example.com:8443/jwks",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://[::1]:4318",
        NO_PROXY="mcp.example.com",
        **ALONE,
    )
    named = {"http://127.0.0.1:9101", "https://[::1]:9102", "http://localhost", "https://id.example.com:8443", "mcp.example.com"}
    collector = {
        "http://localhost:4318",
        "localhost:4318",
    }  # Its exporter knows no scheme there, and an address without a port only.
    assert found.pop("ALL_PROXY") == CLOSED_DOOR
    assert set(found.pop("NO_PROXY").split(",")) == {f"https://{host}" for host in VENDORS} | named | collector
    assert not found


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "all_proxy"])
def test_an_operators_proxy_decides_about_https_and_plain_http_stays_closed(tmp_path: Path, name: str) -> None:
    plain = {"OPENAI_PASSTHROUGH_URL": "http://127.0.0.1:9101", "no_proxy": "ours.example"}
    proxy = "http://ann:secret@proxy.example:3128"
    assert reached(tmp_path, **plain, **{name: proxy}) == {
        "ALL_PROXY": CLOSED_DOOR,
        "HTTPS_PROXY": proxy,
        "NO_PROXY": "ours.example,http://127.0.0.1:9101",
    }


def test_a_provider_that_is_added_to_run_yaml_needs_nothing_else(tmp_path: Path, project: Path) -> None:
    """And one that the egress door does not know is reached past it."""
    more = [
        {"provider_id": "more", "provider_type": "remote::passthrough", "config": {"base_url": "https://more.example:8443/api"}},
        {
            "provider_id": "even",
            "provider_type": "remote::passthrough",
            "config": {"base_url": "${env.EVEN_PASSTHROUGH_URL:=http://e.example}"},
        },
    ]
    providers = RUN_YAML["providers"] | {"inference": RUN_YAML["providers"]["inference"] + more}
    (project / "run.yaml").write_text(yaml.safe_dump(RUN_YAML | {"providers": providers}, sort_keys=False))
    gateway = Gateway(tmp_path / "home", cwd=project, EVEN_PASSTHROUGH_URL="http://even.example:81")
    environ = gateway.environ_at_start()
    assert {"https://more.example:8443", "http://even.example:81", "http://e.example"} <= set(environ["NO_PROXY"].split(","))
    assert environ["EVEN_PASSTHROUGH_URL"] == "http://even.example:81"
    if HAPROXY:
        assert f"http://127.0.0.1:{gateway.port + 1}" in environ["NO_PROXY"].split(",")


def test_nobody_is_called_by_plain_http(vendors: Vendors, tmp_path: Path) -> None:
    """A proxy for it would see who is called at the start, with each call, or in the end."""
    vendors.strangers.clear()
    with Accepts() as proxy:
        settings = dict.fromkeys(("HTTP_PROXY", "http_proxy"), f"http://127.0.0.1:{proxy.port}")
        with Gateway(tmp_path, **settings, **vendors.environ()) as gateway, caller(gateway.url, timeout=60) as client:
            for stream in (False, True):
                assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0], stream=stream)).is_success
                assert client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0], stream=stream)).is_success
            client.get("/v1/models", headers=ALL_KEYS)
        assert proxy.kept == []
    assert vendors.strangers == []


def test_https_is_spoken_without_a_front_too(tmp_path: Path) -> None:
    """By the server itself, which is told where the files are from wherever it runs. Behind a front it speaks plain HTTP."""
    certificate = trustme.CA().issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
    files = {
        f"LLAMA_STACK_TLS_{kind}FILE": os.path.relpath(tmp_path / f"tls.{end}", PROJECT)
        for kind, end in (("CERT", "crt"), ("KEY", "key"))
    }
    environ = Gateway(tmp_path / "alone", **files, **ALONE).environ_at_start()
    assert {name: environ.get(name) for name in files} == {
        "LLAMA_STACK_TLS_CERTFILE": str(tmp_path / "tls.crt"),
        "LLAMA_STACK_TLS_KEYFILE": str(tmp_path / "tls.key"),
    }
    if HAPROXY:
        assert not Gateway(tmp_path / "front", **files).environ_at_start().keys() & files.keys()
