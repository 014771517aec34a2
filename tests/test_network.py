"""A server for a team, by environment alone: host, TLS, tokens, one browser origin, two workers and metrics.

It is asked of the stock server without a front. With one: test_a_team_s_server_and_its_metrics in test_documents.py.
"""

import base64
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jwt
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.calls import ALL_KEYS, MODELS, caller, chat, events, message
from support.gateway import ALONE, Gateway, wait_for
from support.services import ISSUER, Services
from support.vendors import KEYS, Vendors

# Not the usual loopback address, so that answering here shows that LLAMA_STACK_HOST was heard.
HOST = "127.0.0.2"
PAGE = "https://chat.example.com"
PROMPT = "a prompt that stays between caller and vendor"


def unsigned(token: str) -> str:
    """The same claims under `alg: none`."""
    return jwt.encode(jwt.decode(token, options={"verify_signature": False}), None, "none", headers={"kid": "key-1"})


def signed_with_the_public_key(services: Services) -> str:
    """The same claims under HS256, with the RSA public key as the secret: a classic forgery."""
    claims = jwt.decode(services.token(), options={"verify_signature": False})
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "kid": "key-1"}, claims)]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    secret = services.signing_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = base64.urlsafe_b64encode(hmac.digest(secret, text, hashlib.sha256)).rstrip(b"=")
    return (text + b"." + signature).decode()


@pytest.fixture(scope="module")
def team_gateway(vendors: Vendors, services: Services, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway with every setting of a team's server."""
    folder: Path = tmp_path_factory.mktemp("team")
    authority = trustme.CA()
    certificate = authority.issue_cert(HOST)
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    gateway = Gateway(
        folder / "home",
        LLAMA_STACK_HOST=HOST,
        LLAMA_STACK_WORKERS="2",
        LLAMA_STACK_TLS_CERTFILE=str(folder / "tls.crt"),
        LLAMA_STACK_TLS_KEYFILE=str(folder / "tls.key"),
        LLAMA_STACK_CORS_ORIGIN=PAGE,
        AUTH_JWKS_URI=f"{services.url}/jwks",
        AUTH_ISSUER=ISSUER,
        OTEL_EXPORTER_OTLP_ENDPOINT=services.url,
        OTEL_METRIC_EXPORT_INTERVAL="500",
        **ALONE,
        **vendors.environ(),
    )
    gateway.trust = ssl.create_default_context()
    authority.configure_trust(gateway.trust)
    with gateway:
        yield gateway


@pytest.fixture(scope="module")
def team(team_gateway: Gateway) -> Iterator[httpx.Client]:
    """An HTTPS client for the team's gateway. A connection for each call, so that both workers are met."""
    with caller(team_gateway.url, verify=team_gateway.trust) as client:
        yield client


@pytest.fixture
def token(services: Services) -> dict[str, str]:
    """The header of a caller who may use the gateway."""
    return {"Authorization": f"Bearer {services.token()}"}


def test_has_the_workers_that_are_set(team_gateway: Gateway) -> None:
    assert len(team_gateway.workers) == int(team_gateway.settings["LLAMA_STACK_WORKERS"])


def test_listens_on_the_host_that_is_set_and_there_alone(team_gateway: Gateway, team: httpx.Client) -> None:
    assert team.get("/v1/health").json() == {"status": "OK"}
    with pytest.raises(httpx.ConnectError, match="refused"):
        httpx.get(f"https://127.0.0.1:{team_gateway.port}/v1/health", trust_env=False, verify=team_gateway.trust, timeout=60)


def test_speaks_tls_alone(team_gateway: Gateway) -> None:
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{team_gateway.url}/v1/health", trust_env=False, timeout=60)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(team_gateway.url.replace("https", "http") + "/v1/health", trust_env=False, timeout=60)


def test_a_caller_without_a_token_is_refused(team: httpx.Client) -> None:
    for call in (team.get("/v1/models"), team.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0]))):
        assert call.status_code == 401
        assert ISSUER in message(call)


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda services: services.token(exp=int(time.time()) - 1), id="expired"),
        pytest.param(lambda services: services.token(aud="another-service"), id="for another audience"),
        pytest.param(lambda services: services.token(iss="https://other.example.com"), id="by another issuer"),
        pytest.param(lambda services: services.token(rsa.generate_private_key(65537, 2048)), id="wrongly signed"),
        pytest.param(lambda services: services.token(kid="key-2"), id="by an unknown key"),
        pytest.param(lambda services: unsigned(services.token()), id="unsigned"),
        pytest.param(signed_with_the_public_key, id="signed with the public key"),
        pytest.param(lambda _: KEYS["openai"], id="a vendor's key"),
    ],
)
def test_a_bad_token_is_refused(
    team_gateway: Gateway, team: httpx.Client, vendors: Vendors, services: Services, forge: Callable[[Services], str]
) -> None:
    """The log tells it from a vendor's 401. What was wrong with the token, the stock server does not say there."""
    said = team_gateway.log.count("A token was refused")
    headers = ALL_KEYS | {"Authorization": f"Bearer {forge(services)}"}
    response = team.post("/v1/chat/completions", headers=headers, json=chat(MODELS[0], "with a bad token"))
    assert response.status_code == 401
    assert message(response) == "Invalid JWT token"
    assert not vendors.seen_with("with a bad token")
    wait_for(lambda: team_gateway.log.count("A token was refused") > said, seen=lambda: team_gateway.log)


def test_a_good_token_is_served_and_reaches_no_vendor(team: httpx.Client, vendors: Vendors, token: dict[str, str]) -> None:
    assert [model["id"] for model in team.get("/v1/models", headers=token).json()["data"]] == MODELS
    for model in MODELS:
        answer = team.post("/v1/chat/completions", headers=token | ALL_KEYS, json=chat(model, f"{model} {PROMPT}"))
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        stream = team.post("/v1/chat/completions", headers=token | ALL_KEYS, json=chat(model, f"{model} {PROMPT}", stream=True))
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "stop"
        for arrived in vendors.seen_with(f"{model} {PROMPT}"):
            assert arrived.key == f"Bearer {KEYS[arrived.vendor]}"
    secret = token["Authorization"].removeprefix("Bearer ")
    assert not [seen for seen in list(vendors.seen) if secret in str(seen)]


def test_a_token_without_vendor_keys_gets_the_vendors_refusal(
    team: httpx.Client, vendors: Vendors, token: dict[str, str]
) -> None:
    """Who may call and who pays are two things: a token never stands in for a key."""
    response = team.post("/v1/chat/completions", headers=token, json=chat(MODELS[0], "a token alone"))
    assert response.status_code == 401
    assert all(token["Authorization"] != seen.key for seen in vendors.seen_with("a token alone"))


def test_the_route_policy_holds_for_callers_with_a_token(team: httpx.Client, token: dict[str, str]) -> None:
    for path in ("/v1/prompts", "/v1/conversations", "/v1/providers"):
        assert team.get(path, headers=token).status_code == 403


def test_health_needs_no_token(team: httpx.Client) -> None:
    assert team.get("/v1/health").is_success
    assert team.get("/docs").status_code == 401


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    # An SDK's own headers are among them.
    "Access-Control-Request-Headers": "authorization,content-type,x-llamastack-provider-data,x-stainless-lang",
}


def test_a_page_of_the_one_origin_may_call(team: httpx.Client, token: dict[str, str]) -> None:
    """A preflight carries no token, so it has to pass before tokens are asked for."""
    preflight = team.options("/v1/chat/completions", headers=PREFLIGHT | {"Origin": PAGE})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert {"x-llamastack-provider-data", "x-stainless-lang"} <= set(preflight.headers["access-control-allow-headers"].split(","))
    assert "access-control-allow-credentials" not in preflight.headers
    for headers in (token | ALL_KEYS, {}):
        answer = team.post("/v1/chat/completions", headers=headers | {"Origin": PAGE}, json=chat(MODELS[0]))
        assert answer.headers["access-control-allow-origin"] == PAGE, "a page can read answers and refusals"


def test_a_page_may_get_and_post_and_no_more(team: httpx.Client) -> None:
    asked = {
        verb: team.options("/v1/models", headers={"Origin": PAGE, "Access-Control-Request-Method": verb}).status_code
        for verb in ("GET", "POST", "PUT", "PATCH", "DELETE")
    }
    assert asked == {"GET": 200, "POST": 200, "PUT": 400, "PATCH": 400, "DELETE": 400}


@pytest.mark.parametrize("origin", ["https://evil.example.com", f"{PAGE}.evil.com", "http://chat.example.com", "null", "none"])
def test_a_page_of_another_origin_may_not(team: httpx.Client, token: dict[str, str], origin: str) -> None:
    preflight = team.options("/v1/chat/completions", headers=PREFLIGHT | {"Origin": origin})
    assert preflight.status_code == 400
    answer = team.get("/v1/models", headers=token | {"Origin": origin})
    assert not [name for name in [*preflight.headers, *answer.headers] if name == "access-control-allow-origin"]


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000", "null"])
def test_no_page_may_call_unless_its_origin_is_set(server: httpx.Client, origin: str) -> None:
    preflight = server.options("/v1/chat/completions", headers=PREFLIGHT | {"Origin": origin})
    answer = server.get("/v1/models", headers={"Origin": origin})
    assert preflight.is_client_error
    assert not [name for name in [*preflight.headers, *answer.headers] if name.startswith("access-control-allow-origin")]


def test_metrics_reach_the_collector(team: httpx.Client, services: Services, token: dict[str, str]) -> None:
    headers = token | ALL_KEYS
    for _ in range(5):
        team.post("/v1/chat/completions", headers=headers, json=chat(MODELS[0], PROMPT))
        team.post("/v1/chat/completions", headers=headers, json=chat(MODELS[0], PROMPT, stream=True))
    wanted = "llama_stack.inference.time_to_first_token_seconds"

    def workers() -> set[str]:
        """The workers that have told of themselves. Of calls that come at once, on connections of their own, each gets some."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: team.get("/v1/models", headers=headers | {"Connection": "close"}), range(32)))
        return {point["service.instance.id"] for points in services.metrics().values() for point in points}

    wait_for(lambda: any(point["value"] >= 1 for point in services.metrics().get(wanted, [])))
    wait_for(lambda: len(workers()) == 2)  # A collector must be able to tell the two workers' counters apart.
    metrics = services.metrics()
    served = {"method": "openai_chat_completion", "status_code": "200"}.items()
    assert sum(point["value"] for point in metrics["llama_stack.requests_total"] if served <= point.items()) > 1
    assert any(point["value"] > 0 for point in metrics["llama_stack.request_duration_seconds"])
    assert {(point["model"], point["provider"]) for point in metrics[wanted]} >= {(MODELS[0], "openai")}
    assert "llama_stack.concurrent_requests" in metrics
    assert {point["service.name"] for points in metrics.values() for point in points} == {"lls-openai"}


def test_telemetry_and_log_hold_no_key_token_or_prompt(
    team: httpx.Client, team_gateway: Gateway, services: Services, token: dict[str, str]
) -> None:
    team.post("/v1/chat/completions", headers=token | ALL_KEYS, json=chat(MODELS[0], PROMPT))
    team.post("/v1/chat/completions", headers=token | ALL_KEYS, json=chat("openai/status-500", PROMPT))
    team.post("/v1/chat/completions", headers={"Authorization": "Bearer " + KEYS["openai"]}, json=chat(MODELS[0], PROMPT))
    last = "openai/the-last-of-these"
    team.post("/v1/chat/completions", headers=token | ALL_KEYS, json=chat(last, stream=True))
    wait_for(lambda: any(point.get("model") == last for points in services.metrics().values() for point in points))
    exported = b"".join(body for _, body in services.received)
    for secret in (*KEYS.values(), token["Authorization"].split(".")[0], PROMPT):
        assert secret.encode() not in exported
        assert secret not in team_gateway.log
