"""What can be set, and what is wrong with it: a sentence for each, with exit code 2, before anything is started.

One start tells all that is wrong with its settings, so that many cases take one process.
"""

import contextlib
import itertools
import re
import socket
import subprocess
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, load_pem_private_key
from support.gateway import ALONE, PROJECT, Gateway, copy_project, free_port, make_environ, refused

A_PORT = "it has to be a port from 1024 to 65535"
A_URL = "it has to be a URL that starts with https:// or http://, without a query"
AN_ORIGIN = "it has to be one origin as browsers write it"

# What each setting refuses, and why.
WRONG = {
    "LLAMA_STACK_PORT": (A_PORT, "abc", "80", "1023", "65536", "-1", "8321.0", "٨٣٢١", "9" * 5000, "tcp://10.0.0.1:8321"),
    "EGRESS_PORT": (A_PORT, "80", "x"),
    "LLAMA_STACK_WORKERS": ("set it to a number of processes", "0", "abc", "-2", "1.5", "1000"),
    "FRONT": ("set it to 1, to demand it, or to 0", "maybe", "2", "True"),
    "EGRESS": ("set it to 1, to demand it, or to 0", "maybe", "$(shell false)"),
    "FRONT_BODY_LIMIT": ("set it to a number of bytes", "0", "50MB"),
    "LLAMA_STACK_HOSTS": ("set it to names, with spaces between", "a/b", "https://gateway.example", 'a"b'),
    "LLAMA_STACK_LOG_FORMAT": ("only the lines of json can be cleared", "console", "JSON"),
    "LLAMA_STACK_LOG_FILE": ("callers' keys and prompts would be written there", "/tmp/log"),
    "NO_PROXY": ("a call could then lead the server to any address", "*", "a.example, *"),
    "no_proxy": ("a call could then lead the server to any address", "*"),
    "OPENAI_PASSTHROUGH_URL": (
        A_URL,
        "api.openai.com",
        "https://",
        "https://a.example:99999",
        "https://[::1",
        "https://a b.example",
    ),
    "GEMINI_PASSTHROUGH_URL": ("leave out the /v1 at its end", "https://a.example/v1", "https://a.example/v1/"),
    "AUTH_JWKS_URI": (
        A_URL,
        "id.example.com",
        "HTTPS://id.example.com",
        "https://id.example.com/jwks?tenant=1",
        "https://a,b.example",
        "https://a.example:0",
    ),
    "OTEL_EXPORTER_OTLP_ENDPOINT": (
        "name the collector's host",
        "http://10.0.0.1:4318",
        "http://[fd00::1]:4318",
        "http://a:b@10.0.0.1",
    ),
    "LLAMA_STACK_CORS_ORIGIN": (
        AN_ORIGIN,
        "https://chat.example.com/",
        "https://a.example.com,https://b.example.com",
        "chat.example.com",
        "*",
        "null",
        "https://Chat.example.com",
        "https://chat.example.com:443",
        "http://chat.example.com:80",
        "https://ann@chat.example.com",
        "https://bücher.example",
    ),
}

# Names that are nearly one of ours, and ours.
MISSPELT = {
    "AUTH_JWKS_URL": "AUTH_JWKS_URI",
    "AUTH_JWK_URI": "AUTH_JWKS_URI",
    "LLAMA_STACK_PORTS": "LLAMA_STACK_PORT",
    "LLAMA_STACK_WORKER": "LLAMA_STACK_WORKERS",
    "LLAMASTACK_HOST": "LLAMA_STACK_HOST",
    "LLAMA_STACK_CORS_ORIGINS": "LLAMA_STACK_CORS_ORIGIN",
    "LLAMA_STACK_TLS_CERT_FILE": "LLAMA_STACK_TLS_CERTFILE",
    "EGRES": "EGRESS",
    "egress_port": "EGRESS_PORT",
    "OPENAI_PASSTHROUGH_URLS": "OPENAI_PASSTHROUGH_URL",
}

VENDORS = ("ANTHROPIC_PASSTHROUGH_URL", "GEMINI_PASSTHROUGH_URL", "OPENAI_PASSTHROUGH_URL")

# Of others: Auth.js, Kubernetes for a service of that name, the client, Istio, Llama Stack itself. And one without a value.
ALIKE = {
    "AUTH_SECRET": "x",
    "AUTH_URL": "x",
    "LLAMA_STACK_SERVICE_HOST": "10.0.0.1",
    "LLAMA_STACK_SERVICE_PORT": "8321",
    "LLAMA_STACK_PORT_8321_TCP_ADDR": "10.0.0.1",
    "LLAMA_STACK_BASE_URL": "http://localhost:1",
    "LLAMA_STACK_API_KEY": "x",
    "LLAMA_STACK_LOGGING": "all=debug",
    "INGRESS_PORT": "80",
    "HTTP_PROXY": "http://proxy.example:3128",
    "AUTH_JWKS_URL": "",
}

# What works, beside the defaults.
RIGHT = [
    {"LLAMA_STACK_WORKERS": "12", "FRONT": "no", "EGRESS": "false", "FRONT_BODY_LIMIT": "1", "LLAMA_STACK_LOG_FORMAT": "json"},
    {"LLAMA_STACK_HOSTS": "gateway.example a-b.example,c", "LLAMA_STACK_CORS_ORIGIN": "https://chat.example.com:8443"},
    {"LLAMA_STACK_CORS_ORIGIN": "chrome-extension://abcdef", "NO_PROXY": "*.example.com,10.0.0.1"},
    {"OPENAI_PASSTHROUGH_URL": "https://ann:secret@a.example:8443/openai", "GEMINI_PASSTHROUGH_URL": "http://[::1]:1/v1beta"},
    {"EGRESS_PORT": "1024"},
    {"AUTH_JWKS_URI": "https://id.example.com/jwks", "AUTH_ISSUER": "x", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"},
    dict.fromkeys((*WRONG, "HTTPS_PROXY", "SQLITE_STORE_DIR", "LLAMA_STACK_TLS_CERTFILE", "AUTH_ISSUER", "AUTH_AUDIENCE"), ""),
    ALIKE,
]


def test_a_value_that_cannot_work_is_a_sentence(tmp_path: Path) -> None:
    """The first of each setting at once, then the second of each."""
    values = [[(name, value, why) for value in values] for name, (why, *values) in WRONG.items()]
    for each in itertools.zip_longest(*values):
        batch = sorted(filter(None, each))
        said = refused(tmp_path, **{name: value for name, value, _ in batch}).splitlines()
        assert len(said) == len(batch), said
        for (name, value, why), sentence in zip(batch, said, strict=True):
            shown = re.sub("//.*@", "//...@", value).split("?")[0]
            assert sentence.startswith(f"{name} is '{shown}"), sentence
            assert why in sentence


def test_a_name_that_is_nearly_one_of_ours_is_refused(tmp_path: Path) -> None:
    said = refused(
        tmp_path,
        MISTRAL_PASSTHROUGH_URL="https://x",
        OTEL_EXPORTER_OTLP_METRICS_ENDPOINT="x",
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="x",
        **dict.fromkeys(MISSPELT, "x"),
    )
    expected = {f"{name} is not a setting. Is {ours} meant?" for name, ours in MISSPELT.items()} | {
        f"MISTRAL_PASSTHROUGH_URL is not a setting: no provider in run.yaml reads it. There are {', '.join(VENDORS)}.",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT is not a setting: one collector is sent all, OTEL_EXPORTER_OTLP_ENDPOINT.",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is not a setting: one collector is sent all, OTEL_EXPORTER_OTLP_ENDPOINT.",
    }
    assert set(said.splitlines()) == expected


@pytest.mark.parametrize("settings", RIGHT, ids=lambda settings: next(iter(settings)))
def test_what_can_work_is_not_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    """What is refused here comes behind the settings. Empty ones are the defaults, and names that are merely alike are ignored."""
    with socket.create_server(("127.0.0.1", 0)) as rival:
        port = str(rival.getsockname()[1])
        assert refused(tmp_path, **settings | {"LLAMA_STACK_PORT": port}).startswith(f"Port {port} is in use.")


@pytest.mark.parametrize("name", ["LLAMA_STACK_HOST", "AUTH_AUDIENCE", "OPENAI_PASSTHROUGH_URL", "SQLITE_STORE_DIR"])
def test_a_line_break_is_refused(tmp_path: Path, name: str) -> None:
    said = refused(tmp_path, **{name: "https://a.example\nOPENAI_PASSTHROUGH_URL=x"})
    assert said == f"{name} has a line break or another control character in it. Set it again.\n"


@pytest.mark.parametrize(
    "url",
    ["https://ann:fake-secret@a.example?x", "ann:fake-secret@a.example:1", "http://ann:fake-/?secret@a.example/?key=fake-secret"],
)
def test_a_password_in_a_url_is_never_printed(tmp_path: Path, url: str) -> None:
    said = refused(tmp_path, AUTH_JWKS_URI=url)
    assert "a.example" in said
    assert "fake-" not in said


COMBINED = {
    "EGRESS_PORT=20001 LLAMA_STACK_PORT=20001": "EGRESS_PORT and LLAMA_STACK_PORT are both 20001: the egress door needs a port of its own.",
    "LLAMA_STACK_PORT=65535": "No port comes after 65535 for the egress door: set EGRESS_PORT.",
    "AUTH_ISSUER=https://id.example.com": "Without AUTH_JWKS_URI nobody needs a token: set it, or unset AUTH_ISSUER and AUTH_AUDIENCE.",
    "AUTH_AUDIENCE=us": "Without AUTH_JWKS_URI nobody needs a token: set it, or unset AUTH_ISSUER and AUTH_AUDIENCE.",
    "LLAMA_STACK_TLS_CERTFILE=/any": "For HTTPS, set both LLAMA_STACK_TLS_CERTFILE and LLAMA_STACK_TLS_KEYFILE.",
    "LLAMA_STACK_TLS_KEYFILE=/any": "For HTTPS, set both LLAMA_STACK_TLS_CERTFILE and LLAMA_STACK_TLS_KEYFILE.",
    "LLAMA_STACK_TLS_CERTFILE=/no/such LLAMA_STACK_TLS_KEYFILE=/dev/null": "/no/such cannot be read: see the LLAMA_STACK_TLS_ settings.",
}


@pytest.mark.parametrize("settings", COMBINED)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, settings: str) -> None:
    assert refused(tmp_path, **dict(each.split("=", 1) for each in settings.split())) == COMBINED[settings] + "\n"


def test_a_certificate_that_cannot_serve_is_a_sentence(tmp_path: Path) -> None:
    """One that is none, one with another's key, and a key with a passphrase, for which OpenSSL would ask at the terminal."""
    certificates = [trustme.CA().issue_cert("a.example") for _ in range(2)]
    key = load_pem_private_key(certificates[0].private_key_pem.bytes(), None)
    for name, blob in {
        "none": trustme.Blob(b"not a certificate\n"),
        "certificate": certificates[0].cert_chain_pems[0],
        "other": certificates[1].private_key_pem,
        "locked": trustme.Blob(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"fake"))),
    }.items():
        blob.write_to_path(tmp_path / name)
    for certificate, key, words in (
        ("none", "none", "are no certificate and its key"),
        ("certificate", "other", "are no certificate and its key: [X509: KEY_VALUES_MISMATCH]"),
        ("certificate", "locked", "has a passphrase, for which nobody is asked: give the server a key without."),
    ):
        tls = {"LLAMA_STACK_TLS_CERTFILE": str(tmp_path / certificate), "LLAMA_STACK_TLS_KEYFILE": str(tmp_path / key)}
        said = refused(tmp_path, **tls)
        assert words in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("rival", "host"),
    [
        ("127.0.0.1", ""),
        ("::1", ""),
        ("0.0.0.0", ""),
        ("::", ""),
        ("::1", "0.0.0.0"),
        ("127.0.0.1", "::1"),
        ("127.0.0.2", "127.0.0.2"),
    ],
)
@pytest.mark.parametrize("front", ["", "0"])
def test_a_port_that_somebody_else_has_is_refused(tmp_path: Path, rival: str, host: str, front: str) -> None:
    """Also on ::1, which is `localhost` to many clients: they would send it their keys. Whether it answers there or not."""
    family = socket.AF_INET6 if ":" in rival else socket.AF_INET
    with socket.create_server((rival, 0), family=family, dualstack_ipv6=rival == "::", backlog=0) as listener:
        port = listener.getsockname()[1]
        with contextlib.suppress(OSError):
            socket.create_connection((rival, port), timeout=1)  # Its queue is full with that.
        said = refused(tmp_path, LLAMA_STACK_PORT=str(port), LLAMA_STACK_HOST=host, FRONT=front)
    assert said == f"Port {port} is in use. Stop what listens there, or choose another with LLAMA_STACK_PORT.\n"


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.1", "Cannot assign requested address"),
        ("gateway.invalid", "Name or service not known"),
        ("a" * 70, "not a name"),
        ("127.0.0.1 x", "Name or service not known"),
    ],
)
def test_an_address_that_cannot_be_had_is_a_sentence(tmp_path: Path, host: str, words: str) -> None:
    said = refused(tmp_path, LLAMA_STACK_HOST=host)
    assert said.startswith(f"LLAMA_STACK_HOST is '{host}'")
    assert said.endswith(f": {words}.\n")


def test_of_env_file_the_port_alone_is_read(tmp_path: Path, project: Path) -> None:
    """An exported variable overrides it. A line that sets nothing does not take what is on the next one, such as a key."""
    others = "FRONT=maybe\nAUTH_JWKS_URL=x\n"
    for text, port in (
        ("LLAMA_STACK_PORT=80", "80"),
        ("  export LLAMA_STACK_PORT = '80' # ours", "80"),
        ("LLAMA_STACK_PORT=abc\nLLAMA_STACK_PORT=81", "81"),
    ):
        (project / ".env").write_text(others + text + "\n")
        assert refused(tmp_path, project, LLAMA_STACK_PORT="") == f"LLAMA_STACK_PORT is '{port}': {A_PORT}. {TO_ANSWER_ON_80}\n"
    assert "is '79'" in refused(tmp_path, project, LLAMA_STACK_PORT="79")
    (project / ".env").write_text(f"LLAMA_STACK_PORT=\nOPENAI_API_KEY=sk-fake-in-the-file\n{others}")
    demanded = {"LLAMA_STACK_PORT": "", "EGRESS": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}  # Refused for that.
    said = refused(tmp_path, project, **demanded)
    assert "sk-fake" not in said
    assert "LLAMA_STACK_PORT" not in said
    (project / ".env").write_bytes(b"OPENAI_API_KEY=\xff\n")
    assert refused(tmp_path, project, **demanded) == said
    # The project's folder may be somebody else's. What it starts with, Python itself keeps.
    assert {file.name.partition(".")[0] for file in project.rglob("*.pyc")} <= {"__main__"}


TO_ANSWER_ON_80 = "To answer on 80 or 443, put a balancer in front (deploy/README.md)."


def test_make_hands_on_settings_and_runs_nothing_that_is_in_them(tmp_path: Path) -> None:
    """PORT is no setting, which `make server PORT=80` would not notice. And make's own $( ) is not for what a user has set."""

    def make(*arguments: str, **settings: str) -> str:
        environ = make_environ(tmp_path, LLAMA_STACK_PORT=str(free_port()), **settings)
        command = ["make", "server", *arguments]
        done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, done.stdout
        return done.stderr

    assert "To choose the port, type: make server LLAMA_STACK_PORT=8400" in make("PORT=8400")
    shell = f"$(shell touch {tmp_path / 'ran'})"
    assert "EGRESS is '" in make(EGRESS=shell)
    assert not (tmp_path / "ran").exists()


def test_a_broken_run_yaml_is_a_sentence(tmp_path: Path, project: Path) -> None:
    """What the start sees by itself. What the server says of others is shown as it is: test_start_lifetime.py."""
    file = project / "run.yaml"
    shipped = file.read_text()
    for change, words in (
        ("\n\t- [", "run.yaml cannot be read: while scanning for the next token"),
        (None, "run.yaml is not the one that ships: it has no default for LLAMA_STACK_HOST."),
        ("\nproviders: nobody\n", "run.yaml is not the one that ships: it has no providers of inference."),
    ):
        file.write_text(shipped + change if change else "")
        assert words in refused(tmp_path, project)
    file.unlink()
    assert "run.yaml cannot be read: [Errno 2]" in refused(tmp_path, project)


def test_what_should_not_surprise_is_said(tmp_path: Path) -> None:
    """Who may call, and where a call can lead the server."""
    named = {
        "AUTH_JWKS_URI": "http://a.test",
        "OPENAI_PASSTHROUGH_URL": "http://b.test",
        "GEMINI_PASSTHROUGH_URL": "http://c.test:81",
    }
    open_to_all = Gateway(tmp_path / "all", LLAMA_STACK_HOST="0.0.0.0", OTEL_EXPORTER_OTLP_ENDPOINT="http://d.test", **ALONE)
    with_tokens = Gateway(tmp_path / "tokens", LLAMA_STACK_HOST="0.0.0.0", **named, **ALONE)
    for_us_alone = Gateway(
        tmp_path / "us",
        LLAMA_STACK_HOST="127.0.0.2",
        HTTPS_PROXY="http://p.invalid",
        OPENAI_PASSTHROUGH_URL="https://a.test",
        **ALONE,
    )
    for gateway in (open_to_all, with_tokens):
        gateway.environ_at_start()
    for_us_alone.environ_at_start(lambda: "no name server knows the proxy's name" in for_us_alone.log)
    assert "this machine" not in for_us_alone.log
    assert "may fail" not in for_us_alone.log, "it is known where each provider of run.yaml connects to"
    assert "names no port" not in for_us_alone.log, "the proxy decides"
    everybody = "Whoever can reach this machine can use the gateway: no token is demanded (AUTH_JWKS_URI)."
    assert everybody in open_to_all.log
    assert everybody not in with_tokens.log
    for gateway, name, host in (
        (open_to_all, "OTEL_EXPORTER_OTLP_ENDPOINT", "d.test"),
        (with_tokens, "AUTH_JWKS_URI", "a.test"),
        (with_tokens, "OPENAI_PASSTHROUGH_URL", "b.test"),
    ):
        assert f"{name} names no port, so calls can lead the server to every port of {host}." in gateway.log
    assert "c.test" not in with_tokens.log.replace("Calls to c.test will fail", "")


def test_a_provider_of_whom_nobody_knows_where_it_connects_to_is_told(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    file = project / "run.yaml"
    added = "  inference:\n  - provider_id: more\n    provider_type: remote::groq\n"
    file.write_text(file.read_text().replace("  inference:\n", added, 1))
    gateway = Gateway(tmp_path / "home", cwd=project, **ALONE)
    gateway.environ_at_start()
    assert "Calls to the provider more may fail: it has no base_url in run.yaml." in gateway.log
