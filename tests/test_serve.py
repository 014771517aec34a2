"""deploy/serve.sh, where the gateway cannot start or its surroundings fail it: a sentence and a true exit code."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from conftest import Figure
from support.calls import ALL_KEYS, MODELS, chat, message
from support.gateway import PROJECT, START, Gateway, clean_environ, free_port, one_cpu
from support.vendors import Vendors

CHAT = "/v1/chat/completions"
NOWHERE = {"HTTPS_PROXY": "http://127.0.0.1:9"}  # The discard port, so that the start asks no vendor.
WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


def serve(folder: Path, home: Path, prefix: str = "", seconds: float = 120, **more: str) -> tuple[int, str]:
    """Run deploy/serve.sh where it cannot succeed: its exit code, as a shell has it, and all that it printed.

    `prefix` is put before it in a shell. Raises TimeoutExpired if it is still there after `seconds`.
    """
    environ = clean_environ(home, **{"LLAMA_STACK_PORT": str(free_port())} | NOWHERE | more)
    script = f"{prefix} exec deploy/serve.sh"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["sh", "-c", script], cwd=folder, env=environ, start_new_session=True, **pipes)
    try:
        said = "".join(process.communicate(timeout=seconds))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, said


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "::1"])
def test_a_port_in_use_is_a_sentence(tmp_path: Path, figures: list[Figure], host: str) -> None:
    """On ::1 too: whoever listens there is `localhost` to many clients, and would be sent their keys."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::") as rival:
        port = rival.getsockname()[1]
        start = time.monotonic()
        code, said = serve(PROJECT, tmp_path, LLAMA_STACK_PORT=str(port))
        seconds = time.monotonic() - start
    assert code == 2
    assert said == f"Port {port} is in use. Stop what listens there, or choose another with LLAMA_STACK_PORT.\n"
    if host == "127.0.0.1":
        figures.append(Figure("the port is in use", "a sentence, exit code 2", seconds, None))


def test_a_port_in_use_on_another_address_is_none_of_our_business(tmp_path: Path, vendors: Vendors) -> None:
    with socket.create_server(("127.0.0.2", 0)) as neighbour:
        port = str(neighbour.getsockname()[1])
        with Gateway(tmp_path, LLAMA_STACK_PORT=port, **vendors.environ()) as gateway:
            assert gateway.answers()


@WORKERS
@pytest.mark.parametrize(
    ("host", "words"),
    [
        pytest.param("127.0.0.2", "address already in use", id="port in use there"),
        pytest.param("192.0.2.1", "annot assign requested address", id="not this machine's"),
        pytest.param("gateway.invalid", "Name or service not known", id="unknown name"),
    ],
)
def test_an_address_that_cannot_be_had_is_a_sentence(
    vendors: Vendors, tmp_path: Path, host: str, words: str, workers: str
) -> None:
    with socket.create_server(("127.0.0.2", 0)) as rival:
        where = {"LLAMA_STACK_HOST": host, "LLAMA_STACK_PORT": str(rival.getsockname()[1])}
        code, said = serve(PROJECT, tmp_path, LLAMA_STACK_WORKERS=workers, **where, **vendors.environ())
    assert code == 2
    assert words.lower() in said.lower()
    assert "The server did not start" in said
    assert "LLAMA_STACK_HOST" in said
    assert "Traceback" not in said


WRONG = {
    "EGRESS=maybe": "EGRESS is 'maybe'",
    "LLAMA_STACK_PORT=abc": "LLAMA_STACK_PORT is 'abc'",
    "LLAMA_STACK_PORT=80": "LLAMA_STACK_PORT is '80'",
    "LLAMA_STACK_PORT=1023": "LLAMA_STACK_PORT is '1023'",
    "LLAMA_STACK_PORT=65536": "LLAMA_STACK_PORT is '65536'",
    "LLAMA_STACK_WORKERS=0": "LLAMA_STACK_WORKERS is '0'",
    "LLAMA_STACK_WORKERS=abc": "LLAMA_STACK_WORKERS is 'abc'",
    "LLAMA_STACK_LOG_FORMAT=console": "LLAMA_STACK_LOG_FORMAT is 'console'",
    "LLAMA_STACK_LOG_FORMAT=JSON": "LLAMA_STACK_LOG_FORMAT is 'JSON'",
    "LLAMA_STACK_LOG_FILE=/tmp/log": "LLAMA_STACK_LOG_FILE is '/tmp/log'",
    "OPENAI_PASSTHROUGH_URL=api.openai.com": "OPENAI_PASSTHROUGH_URL is 'api.openai.com'",
    "AUTH_JWKS_URI=id.example.com": "AUTH_JWKS_URI is 'id.example.com'",
    "OTEL_EXPORTER_OTLP_ENDPOINT=collector:4318": "OTEL_EXPORTER_OTLP_ENDPOINT is 'collector:4318'",
    "AUTH_ISSUER=https://id.example.com": "Without AUTH_JWKS_URI nobody needs a token",
    "AUTH_AUDIENCE=us": "Without AUTH_JWKS_URI nobody needs a token",
    "LLAMA_STACK_TLS_CERTFILE=/any": "set both LLAMA_STACK_TLS_CERTFILE and LLAMA_STACK_TLS_KEYFILE",
    "LLAMA_STACK_TLS_KEYFILE=/any": "set both LLAMA_STACK_TLS_CERTFILE and LLAMA_STACK_TLS_KEYFILE",
    "LLAMA_STACK_TLS_CERTFILE=/no/such LLAMA_STACK_TLS_KEYFILE=/dev/null": "/no/such cannot be read",
    "SQLITE_STORE_DIR=/proc/self": "SQLITE_STORE_DIR is /proc/self",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_is_a_sentence_that_names_it(tmp_path: Path, setting: str) -> None:
    code, said = serve(PROJECT, tmp_path, **dict(each.split("=", 1) for each in setting.split()))
    assert code == 2
    (sentence,) = said.splitlines()
    assert WRONG[setting] in sentence


def test_settings_that_are_empty_are_the_defaults(tmp_path: Path, vendors: Vendors) -> None:
    empty = dict.fromkeys(
        ("LLAMA_STACK_HOST", "LLAMA_STACK_WORKERS", "AUTH_ISSUER", "OPENAI_PASSTHROUGH_URL", "SQLITE_STORE_DIR"), ""
    )
    gateway = Gateway(tmp_path, **empty, **vendors.environ())
    gateway.url = f"http://127.0.0.1:{gateway.port}"
    with gateway:
        assert httpx.post(gateway.url + CHAT, headers=ALL_KEYS, json=chat(MODELS[0]), trust_env=False, timeout=60).is_success


def test_a_key_with_a_passphrase_is_a_sentence_and_no_prompt(tmp_path: Path) -> None:
    key = tmp_path / "tls.key"
    key.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nfake\n-----END ENCRYPTED PRIVATE KEY-----\n")
    code, said = serve(PROJECT, tmp_path, LLAMA_STACK_TLS_CERTFILE=str(key), LLAMA_STACK_TLS_KEYFILE=str(key))
    assert code == 2
    assert said == f"The key in {key} has a passphrase, for which nobody is asked: give the server a key without.\n"


@WORKERS
def test_a_certificate_that_is_none_is_a_sentence(vendors: Vendors, tmp_path: Path, workers: str) -> None:
    """Several workers would be started again and again."""
    file = tmp_path / "tls.pem"
    file.write_text("not a certificate\n")
    tls = {"LLAMA_STACK_TLS_CERTFILE": str(file), "LLAMA_STACK_TLS_KEYFILE": str(file)}
    code, said = serve(PROJECT, tmp_path, LLAMA_STACK_WORKERS=workers, **tls, **vendors.environ())
    assert code != 0
    assert "ssl.SSLError" in said
    assert "Traceback" not in said
    assert "The server did not start" in said


BROKEN = {
    "is not YAML": (lambda text: text + "\n\t- [", "found character '\\t' that cannot start any token"),
    "is empty": (lambda _: "", "run.yaml is not the one that ships"),
    "names an unknown provider": (
        lambda text: text.replace("remote::gemini", "remote::nobody"),
        "Provider `remote::nobody` is not available",
    ),
    "has a URL that is none": (lambda text: text.replace(":=https://api.openai.com}", ":=nonsense}"), "should be a valid URL"),
    "needs a variable that is not set": (
        lambda text: text.replace(":=https://api.anthropic.com}", "}"),
        "Environment variable 'ANTHROPIC_PASSTHROUGH_URL' not set",
    ),
}


@pytest.mark.parametrize(
    "fault", [fault if i < 3 else pytest.param(fault, marks=pytest.mark.slow) for i, fault in enumerate(BROKEN)]
)
def test_a_broken_run_yaml_is_a_sentence(project: Path, tmp_path: Path, figures: list[Figure], fault: str) -> None:
    change, words = BROKEN[fault]
    (project / "run.yaml").write_text(change((project / "run.yaml").read_text()))
    start = time.monotonic()
    code, said = serve(project, tmp_path / "home")
    figures.append(Figure(f"run.yaml {fault}", f"a sentence, exit code {code}", time.monotonic() - start, None))
    assert code != 0
    assert words in said
    assert "Traceback" not in said
    assert 'File "' not in said


@pytest.mark.parametrize("workers", ["2", "4"])
def test_a_broken_run_yaml_is_a_sentence_with_workers_too(
    project: Path, tmp_path: Path, figures: list[Figure], workers: str
) -> None:
    """On one CPU they fail one after the other. One that is told to stop while it fails would stay for ever."""
    (project / "run.yaml").write_text((project / "run.yaml").read_text().replace("remote::gemini", "remote::nobody"))
    start = time.monotonic()
    with one_cpu():
        code, said = serve(project, tmp_path / "home", LLAMA_STACK_WORKERS=workers)
    seconds, fault = time.monotonic() - start, f"run.yaml names an unknown provider, {workers} workers"
    figures.append(Figure(fault, f"a sentence, exit code {code}", seconds, None))
    assert code != 0
    assert "Provider `remote::nobody` is not available" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_workers_that_are_short_of_cpu_come_up(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    """uvicorn replaces a worker that does not answer for 5 s, also while it starts."""
    gateway = Gateway(tmp_path, START, LLAMA_STACK_WORKERS="8", **vendors.environ())
    with one_cpu():
        up, replaced, seconds = gateway.start_workers(200)
    assert (up, replaced) == (8, 0)
    figures.append(Figure("8 workers start on one CPU", "all come up, none is replaced", seconds, None))


def test_a_full_disk_stops_the_boot(tmp_path: Path, figures: list[Figure]) -> None:
    """A limit of 0 on the size of files stands in for a full disk: creating works, writing does not."""
    code, said = serve(PROJECT, tmp_path, prefix="trap '' XFSZ; ulimit -f 0;")
    assert code == 2
    assert "SQLITE_STORE_DIR" in said
    assert "disk" in said
    assert "Traceback" not in said
    figures.append(Figure("the store folder's disk is full when the gateway starts", f"a sentence, exit code {code}", None, None))


def test_a_log_that_cannot_be_written_stops_no_call(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    command = ("sh", "-c", "exec deploy/serve.sh > /dev/full 2>&1")
    with Gateway(tmp_path, command, **vendors.environ()) as gateway:
        for _ in range(5):
            good = httpx.post(gateway.url + CHAT, headers=ALL_KEYS, json=chat(MODELS[0]), trust_env=False, timeout=60)
            assert good.is_success
            bad = chat("openai/status-401")
            refused = httpx.post(gateway.url + CHAT, headers=ALL_KEYS, json=bad, trust_env=False, timeout=60)
            assert refused.status_code == 401
            assert "OpenAI says 401" in message(refused)
    figures.append(Figure("the log's disk is full", "serves, errors too", None, None))
