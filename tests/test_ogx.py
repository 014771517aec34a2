"""The road ahead: this run.yaml, unmodified, on OGX, which continues llama-stack under a new name.

`OGX=ogx make test` tries the newest release.
"""

import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from support.calls import ALL_KEYS, EMBEDDINGS, MODELS, caller, chat, events, vendor_of
from support.gateway import PROVIDER_DATA, START, Gateway, copy_project
from support.services import ISSUER, Services
from support.vendors import KEYS, Vendors

# All that moving takes on the server's side: a name and the command in serve.sh, and a name in the callers' header.
RENAMED = {
    "LLAMA_STACK_LOG_FORMAT": "OGX_LOG_FORMAT",
    "python -P -c 'from llama_stack.cli.llama import main; main()' stack run run.yaml": "ogx run run.yaml",
}
KEYS_FOR_OGX = {"X-OGX-Provider-Data": ALL_KEYS[PROVIDER_DATA]}
PAGE = "https://chat.example.com"


def path(ogx: Path) -> str:
    """A search path on which OGX's environment comes before this one."""
    return f"{ogx / 'venv/bin'}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def ogx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with OGX in it, and a copy of the project that starts it: the folder of both."""
    uv, folder = os.environ.get("UV"), tmp_path_factory.mktemp("ogx")
    if not uv:
        pytest.skip("takes uv run, whose uv installs OGX beside the project")
    subprocess.run([uv, "venv", "--quiet", "--python", "3.12", folder / "venv"], check=True)
    install = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        folder / "venv",
        os.environ.get("OGX", "ogx==1.5.0"),
    ]
    # Elsewhere than in the project, whose constraints are for llama-stack.
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if "Failed to fetch" in done.stderr:
        pytest.skip(f"OGX is not in uv's cache and cannot be fetched: {done.stderr}")
    assert done.returncode == 0, done.stderr
    serve = copy_project(folder) / "deploy/serve.sh"
    for old, new in RENAMED.items():
        assert old in serve.read_text()
        serve.write_text(serve.read_text().replace(old, new))
    return folder


@pytest.fixture(scope="module")
def gateway(ogx: Path, vendors: Vendors, services: Services) -> Iterator[Gateway]:
    """OGX on this run.yaml, with the settings of a team's server."""
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(ogx / "tls.pem")
    tls = {f"LLAMA_STACK_TLS_{half}FILE": str(ogx / "tls.pem") for half in ("CERT", "KEY")}
    settings = tls | {"AUTH_JWKS_URI": f"{services.url}/jwks", "AUTH_ISSUER": ISSUER, "LLAMA_STACK_CORS_ORIGIN": PAGE}
    settings |= {"PATH": path(ogx), "SQLITE_STORE_DIR": str(ogx / "store")}
    gateway = Gateway(ogx / "home", START, ogx, **settings, **vendors.environ())
    gateway.trust = ssl.create_default_context()
    authority.configure_trust(gateway.trust)
    with gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway, services: Services) -> Iterator[httpx.Client]:
    """An HTTPS client with a token."""
    token = {"Authorization": f"Bearer {services.token()}"}
    with caller(gateway.url, headers=token, verify=gateway.trust) as client:
        yield client


def test_lists_the_five_models(client: httpx.Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_every_model_answers_and_every_key_reaches_its_own_vendor(client: httpx.Client, vendors: Vendors, model: str) -> None:
    prompt = f"from ogx to {model}"
    regular = client.post("/v1/chat/completions", headers=KEYS_FOR_OGX, json=chat(model, prompt))
    assert regular.json()["choices"][0]["finish_reason"] == "stop"
    stream = client.post("/v1/chat/completions", headers=KEYS_FOR_OGX, json=chat(model, prompt, stream=True))
    assert events(stream)[-1]["choices"][0]["finish_reason"] == "stop"
    arrived = vendors.seen_with(prompt)
    assert [(seen.vendor, seen.key) for seen in arrived] == [(vendor_of(model), f"Bearer {KEYS[vendor_of(model)]}")] * 2


@pytest.mark.parametrize("model", EMBEDDINGS)
def test_embeddings(client: httpx.Client, model: str) -> None:
    answer = client.post("/v1/embeddings", headers=KEYS_FOR_OGX, json={"model": model, "input": ["a", "b"]}).json()
    assert [item["index"] for item in answer["data"]] == [0, 1]


def test_does_not_read_the_old_header(client: httpx.Client, vendors: Vendors) -> None:
    response = client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0], "the old header"))
    assert response.is_error
    assert not any(seen.key for seen in vendors.seen_with("the old header"))


def test_asks_for_the_same_tokens(client: httpx.Client, services: Services) -> None:
    for bad in ("", f"Bearer {services.token(exp=1)}", f"Bearer {services.token(aud='another-service')}"):
        assert client.get("/v1/models", headers={"Authorization": bad}).status_code == 401
    assert client.get("/v1/health", headers={"Authorization": ""}).is_success


def test_no_longer_knows_cors(client: httpx.Client) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/chat/completions", headers=asked).headers


def test_keeps_nothing_and_refuses_the_same_routes(client: httpx.Client, gateway: Gateway, ogx: Path) -> None:
    client.post("/v1/chat/completions", headers=KEYS_FOR_OGX, json=chat(MODELS[0], "nobody keeps this"))
    assert client.get("/v1/chat/completions").json().get("data", []) == []
    for path in ("/v1/prompts", "/v1/conversations", "/v1/providers"):
        assert client.get(path).status_code == 403
    kept = b"".join(file.read_bytes() for folder in (gateway.home, ogx / "store") for file in folder.rglob("*") if file.is_file())
    for secret in (*KEYS.values(), "nobody keeps this"):
        assert secret.encode() not in kept


def test_asks_for_tls_and_takes_over_the_home_of_llama_stack(ogx: Path, vendors: Vendors, tmp_path: Path) -> None:
    """Without a certificate it wants to be told `--insecure`. It moves ~/.llama, so the store has to be elsewhere."""
    with pytest.raises(RuntimeError, match="TLS required: set tls_certfile/tls_keyfile"):
        Gateway(tmp_path, START, ogx, PATH=path(ogx), **vendors.environ()).start()
    assert not (tmp_path / ".llama").exists()
    assert (tmp_path / ".ogx/distributions/lls-openai/keeps-nothing.db").exists()
