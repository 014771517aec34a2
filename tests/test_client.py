"""main.py, as its users run it."""

import json
import os
import pty
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import pytest
import trustme
from support.calls import EMBEDDINGS, MODELS
from support.gateway import PROJECT, PROVIDER_DATA, Gateway, clean_environ, free_port
from support.services import Services
from support.vendors import KEY_VARIABLES, KEYS, Vendors

MAIN = PROJECT / "main.py"
NO_ANSWER = "No gateway answers at "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the client with no .env: main.py reads the one beside it, and the one in this project may have real keys."""
    for name in ("main.py", "Makefile", "pyproject.toml", "uv.lock", ".python-version"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


@pytest.fixture
def run(folder: Path, gateway: Gateway):
    """Run main.py beside a .env file with `keys`, in an environment with `settings`, and return the ended process."""

    def run(*arguments: str, keys: dict[str, str] = KEY_VARIABLES, **settings: str) -> subprocess.CompletedProcess:
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in keys.items()))
        settings.setdefault("LLAMA_STACK_PORT", str(gateway.port))
        return run_in(folder, sys.executable, "main.py", *arguments, **settings)

    return run


def run_in(folder: Path, *command: str, **settings: str) -> subprocess.CompletedProcess:
    """Run a command with `settings` in its environment. It may print no traceback and no key."""
    environ = clean_environ(folder, **settings)
    ended = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in ended.stderr
    assert not any(key in ended.stdout + ended.stderr for key in KEY_VARIABLES.values())
    return ended


@contextmanager
def impostor(status: int = 200, models: bytes | None = None, answer: bytes | None = None) -> Iterator[tuple[int, list]]:
    """A web server that lists one model, or answers `models`, and to a call `answer`, or hangs up. Gives its port and its calls."""
    listing = {"data": [{"id": "openai/gpt-4o", "custom_metadata": {"model_type": "llm"}}]}
    seen: list[tuple[str, dict[str, str]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.give(status, json.dumps(listing).encode() if models is None else models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if answer is None:
                seen.append((self.path, dict(self.headers)))
                self.connection.close()
            else:
                self.give(500, answer)

        def give(self, status: int, body: bytes) -> None:
            seen.append((self.path, dict(self.headers)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, seen
        server.shutdown()


# --- what it asks ---


def test_it_is_a_lesson_of_under_200_lines() -> None:
    assert len(MAIN.read_text().splitlines()) < 200


def test_asks_every_model_in_both_ways_and_for_both_embeddings(run) -> None:
    ended = run("Why is the sky blue?")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [line.removeprefix("== ") for line in ended.stdout.splitlines() if line.startswith("== ")] == MODELS + EMBEDDINGS
    for manner in ("regular", "streaming"):
        answers = [line for line in ended.stdout.splitlines() if line.startswith(f"{manner}:")]
        assert len(answers) == len(MODELS)
        assert all(answer.endswith("You said: Why is the sky blue?") for answer in answers)
    assert ended.stdout.count("embedding: 8 numbers") == 2


def test_asks_only_the_models_that_are_named(run) -> None:
    ended = run("-m", "anthropic/claude-haiku-4-5-20251001", "--model", "openai/some-other-model")
    assert ended.returncode == 0
    assert ended.stdout.count("== ") == 2
    assert "not some-other-model itself" in ended.stdout


def test_an_embeddings_model_that_is_named_gets_an_embeddings_call(run) -> None:
    ended = run("-m", "openai/text-embedding-3-large")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("\n== openai/text-embedding-3-large\nembedding: 8 numbers")


def test_a_model_without_a_provider(run) -> None:
    ended = run("-m", "gpt-4o", "-m", MODELS[0])
    assert ended.returncode == 1
    assert ended.stderr == "gpt-4o: models are named provider/model, such as openai/gpt-4o.\n"
    assert "streaming: This is a stand-in" in ended.stdout


def test_help(run) -> None:
    ended = run("--help")
    assert ended.returncode == 0
    assert "--model" in ended.stdout


@pytest.mark.parametrize("prompt", ["Why?", 'It\'s $5, "quoted" & $(shell touch x) `touch x`; #1', "-m", "a\nb"])
def test_make_passes_a_prompt_and_models_on(folder: Path, gateway: Gateway, prompt: str) -> None:
    command = ("make", "client", f"PROMPT={prompt}", f"MODEL={MODELS[0]} {MODELS[-1]}")
    ended = run_in(folder, *command, LLAMA_STACK_PORT=str(gateway.port), **KEY_VARIABLES)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count(f"You said: {prompt}\n") == 4
    assert ended.stdout.count("== ") == 2
    assert not (folder / "x").exists()


def test_a_prompt_of_the_shells_own_is_no_prompt(folder: Path, gateway: Gateway) -> None:
    ended = run_in(folder, "make", "client", PROMPT="%n@%m", LLAMA_STACK_PORT=str(gateway.port), **KEY_VARIABLES)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "You said: Say hello" in ended.stdout


# --- keys ---


@pytest.mark.parametrize("missing", ["OPENAI_API_KEY", "GEMINI_API_KEY", "ANTHROPIC_API_KEY"])
def test_a_missing_key_is_named_and_stops_no_other_vendor(run, missing: str) -> None:
    ended = run(keys={name: value for name, value in KEY_VARIABLES.items() if name != missing})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"{missing} is not set" in ended.stdout
    assert "stand-in for" in ended.stdout


def test_a_missing_key_for_the_model_that_was_asked_for_is_a_failure(run) -> None:
    ended = run("-m", "openai/gpt-4o", keys={"GEMINI_API_KEY": KEYS["gemini"]})
    assert ended.returncode == 1
    assert ended.stderr == "Skipped openai/gpt-4o: OPENAI_API_KEY is not set in .env.\n"


def test_no_key_at_all(run) -> None:
    ended = run(keys={})
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert all(name in ended.stderr for name in [*KEY_VARIABLES, ".env.example"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("OPENAI_API_KEY", "openai/gpt-4o answered 401: Incorrect API key provided. You can find your API key at https://platform.openai.com/account/api-keys."),
        ("GEMINI_API_KEY", "gemini/gemini-2.5-flash-lite answered 400: API key not valid. Please pass a valid API key."),
        ("ANTHROPIC_API_KEY", "anthropic/claude-haiku-4-5-20251001 answered 401: invalid x-api-key"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_told_once_and_stops_no_other_vendor(run, name: str, sentence: str) -> None:
    ended = run(keys=KEY_VARIABLES | {name: "sk-fake-wrong"})
    assert ended.returncode == 1
    assert ended.stderr == f"{sentence} Check {name} in .env.\n"
    assert ended.stdout.count("streaming: This is a stand-in") == 5 - {"OPENAI_API_KEY": 3}.get(name, 1)


@pytest.mark.parametrize("key", ["sk fake", "sk-fäke", "“sk-fake”", "sk-fake\tkey"])
@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "LLAMA_STACK_API_KEY"])
def test_a_key_that_no_header_can_carry(run, name: str, key: str) -> None:
    ended = run(keys=KEY_VARIABLES | {name: key})
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"{name} has a character in it that no key has")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "file",
    [
        "OPENAI_API_KEY = sk-fake-openai\n",
        "OPENAI_API_KEY=sk-fake-openai\r\nGEMINI_API_KEY=\r\n",
        "export OPENAI_API_KEY='sk-fake-openai'",
        "\ufeffOPENAI_API_KEY=sk-fake-openai\n",
    ],
    ids=["spaces", "CRLF", "export", "BOM"],
)
def test_env_files_as_editors_write_them(folder: Path, gateway: Gateway, file: str) -> None:
    (folder / ".env").write_bytes(file.encode())
    ended = run_in(folder, sys.executable, "main.py", "-m", MODELS[0], LLAMA_STACK_PORT=str(gateway.port), OPENAI_API_KEY="")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_env_file_that_is_no_text(folder: Path) -> None:
    (folder / ".env").write_text("OPENAI_API_KEY=sk-fake-openai\n", encoding="utf-16")
    ended = run_in(folder, sys.executable, "main.py")
    assert ended.returncode == 1
    assert ended.stderr.startswith("The file .env cannot be read: ")
    assert len(ended.stderr.splitlines()) == 1


def test_an_exported_key_goes_before_env_and_says_so(run, vendors: Vendors) -> None:
    ended = run("-m", MODELS[0], "exported?", OPENAI_API_KEY=f"{KEYS['openai']}-exported")
    assert ended.returncode == 0
    assert {request.key for request in vendors.seen_with("exported?")} == {f"Bearer {KEYS['openai']}-exported"}
    assert ended.stderr == "OPENAI_API_KEY has one value in .env and another in the environment: the environment's is used.\n"


def test_a_key_that_a_message_quotes_is_not_shown(run) -> None:
    """The fixture sees to the key itself; this one to the place where it was."""
    quoting = json.dumps({"error": {"message": f"Your key {KEYS['openai']} and your token sk-fake-token are odd."}})
    with impostor(answer=quoting.encode()) as (port, _):
        ended = run("-m", MODELS[0], LLAMA_STACK_PORT=str(port), LLAMA_STACK_API_KEY="sk-fake-token")
    assert ended.returncode == 1
    assert ended.stderr == "openai/gpt-4o answered 500: Your key [key] and your token [key] are odd.\n"


# --- which gateway ---


def test_it_goes_to_127_0_0_1_whoever_else_is_localhost(run, gateway: Gateway) -> None:
    with socket.socket(socket.AF_INET6) as rival:
        try:
            rival.bind(("::1", gateway.port))
        except OSError:
            pytest.skip("this machine has no ::1")
        rival.listen()
        rival.settimeout(0)
        assert run("-m", MODELS[0]).returncode == 0
        assert "http://127.0.0.1:" in run(LLAMA_STACK_PORT=str(free_port())).stderr, "where localhost is 127.0.0.1 alone"
        with pytest.raises(BlockingIOError):
            rival.accept()


def test_no_proxy_comes_between_on_this_machine(run, gateway: Gateway) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for url in ("", f"http://localhost:{gateway.port}/", f"http://127.0.0.1:{gateway.port}/v1"):
        settings = {"LLAMA_STACK_BASE_URL": url, "HTTP_PROXY": nowhere, "ALL_PROXY": nowhere, "SSL_CERT_FILE": "/nonexistent"}
        ended = run("-m", MODELS[0], **settings)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_elsewhere_it_goes_through_the_environments_proxy_with_the_token(run) -> None:
    with impostor(answer=b"{}") as (port, seen):
        proxy = f"http://127.0.0.1:{port}"
        settings = {"LLAMA_STACK_BASE_URL": "http://gateway.example", "LLAMA_STACK_API_KEY": "sk-fake-token", "HTTP_PROXY": proxy}
        run("-m", MODELS[0], **settings)
    assert [path for path, _ in seen] == ["http://gateway.example/v1/models", "http://gateway.example/v1/chat/completions"]
    assert [headers["Authorization"] for _, headers in seen] == ["Bearer sk-fake-token"] * 2
    assert [PROVIDER_DATA in headers for _, headers in seen] == [False, True]
    assert [headers["Connection"] for _, headers in seen] == ["close"] * 2, "the server may close a kept connection unannounced"


def test_a_teams_gateway(run, tmp_path: Path, vendors: Vendors) -> None:
    """HTTPS by a private CA, and a token for each call."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    trust = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    with Services() as services:
        settings = {
            "LLAMA_STACK_TLS_CERTFILE": str(tmp_path / "tls.crt"),
            "LLAMA_STACK_TLS_KEYFILE": str(tmp_path / "tls.key"),
            "AUTH_JWKS_URI": f"{services.url}/jwks",
        }
        team = Gateway(tmp_path / "team", **settings, **vendors.environ())
        team.trust = trust
        with team:
            asked = ("-m", MODELS[0])
            https = {"LLAMA_STACK_BASE_URL": team.url, "SSL_CERT_FILE": str(tmp_path / "ca.pem")}
            ended = run(*asked, **https, LLAMA_STACK_API_KEY=services.token())
            assert (ended.returncode, ended.stderr) == (0, "")

            for token in ("", services.token(exp=1), services.token(aud="others")):
                ended = run(*asked, **https, LLAMA_STACK_API_KEY=token)
                assert ended.returncode == 1
                wants = "wants a valid token of your identity provider in LLAMA_STACK_API_KEY.\n"
                assert ended.stderr == f"The gateway at {team.url} {wants}"

            ended = run(*asked, LLAMA_STACK_BASE_URL=team.url)
            assert "CERTIFICATE_VERIFY_FAILED" in ended.stderr
            assert "SSL_CERT_FILE if its CA is a private one" in ended.stderr
            ended = run(*asked, LLAMA_STACK_PORT=str(team.port))
            assert ended.stderr.startswith(f"{NO_ANSWER}http://127.0.0.1:{team.port}: ")
            assert "If it speaks TLS, set LLAMA_STACK_BASE_URL=https://" in ended.stderr
            assert (ended.returncode, ended.stdout) == (1, "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"LLAMA_STACK_PORT": "none"}, "Invalid port: 'none'. Start it with make server, and check LLAMA_STACK_PORT."),
        ({"LLAMA_STACK_PORT": "-1"}, "check LLAMA_STACK_PORT."),
        ({"LLAMA_STACK_PORT": "99999999999"}, "check LLAMA_STACK_PORT."),
        ({"LLAMA_STACK_BASE_URL": "gateway.example.com"}, "Check LLAMA_STACK_BASE_URL"),
        ({"LLAMA_STACK_BASE_URL": "http://gateway.example.com:none"}, "Check LLAMA_STACK_BASE_URL"),
        ({"LLAMA_STACK_BASE_URL": "http://"}, "Check LLAMA_STACK_BASE_URL"),
        ({"LLAMA_STACK_BASE_URL": "https://127.0.0.1:1"}, "Check LLAMA_STACK_BASE_URL"),
        ({"LLAMA_STACK_BASE_URL": "https://127.0.0.1:1", "SSL_CERT_FILE": "/nowhere"}, "CA that the environment names cannot be used"),
        ({"LLAMA_STACK_BASE_URL": "http://gateway.invalid", "HTTP_PROXY": "odd://a"}, "proxy or the CA that the environment names"),
    ],
)  # fmt: skip
def test_an_address_that_leads_nowhere(run, settings: dict[str, str], words: str) -> None:
    ended = run(**settings)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_no_gateway(run) -> None:
    port = free_port()
    ended = run(LLAMA_STACK_PORT=str(port))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"{NO_ANSWER}http://127.0.0.1:{port}: ")
    assert "Start it with make server" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>hello</html>"), (200, b"[]"), (404, b"{}"), (301, b"")])
def test_something_else_on_the_port(run, status: int, body: bytes) -> None:
    with impostor(status, body) as (port, seen):
        ended = run(LLAMA_STACK_PORT=str(port))
    assert ended.returncode == 1
    assert "is not the gateway" in ended.stderr
    assert not any(PROVIDER_DATA in headers for _, headers in seen)


# --- what can go wrong on the way ---


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("openai/status-429", "answered 429: OpenAI says 429."),
        ("gemini/status-503", "answered 503: Google says 503."),
        ("anthropic/status-500", "answered 500: Anthropic says 500."),
        ("openai/no-such-model", "answered 404: The model `no-such-model` does not exist or you do not have access to it."),
        ("nobody/anything", "answered 404: Model 'nobody/anything' not found. Use 'client.models.list()' to list available Models."),
        ("openai/html", "answered 502: <html><body><h1>502 Bad Gateway</h1></body></html>"),
        ("openai/hang-up", "answered 500: Internal server error: An unexpected error occurred."),
    ],
)  # fmt: skip
def test_a_vendors_error_is_one_sentence_and_stops_no_other_model(run, model: str, sentence: str) -> None:
    ended = run("-m", model, "-m", MODELS[0])
    assert ended.returncode == 1
    assert ended.stderr == f"{model} {sentence}\n"
    assert "streaming: This is a stand-in" in ended.stdout


BROKEN_OFF = {
    "openai/no-finish": "the stream ended without a finish_reason.",
    "openai/error-event": "Internal server error: An unexpected error occurred.",
    "openai/cut-900": "Internal server error: An unexpected error occurred.",
}


@pytest.mark.parametrize("model", BROKEN_OFF)
def test_a_stream_cut_short_is_a_failure_and_not_an_answer(run, model: str) -> None:
    ended = run("-m", model)
    assert ended.returncode == 1
    assert f"{model} broke off its answer: {BROKEN_OFF[model]}\n" in ended.stderr
    if not model.endswith("900"):
        assert "streaming: This is a" in ended.stdout


def test_a_model_that_falls_silent_stops_no_other(folder: Path, run) -> None:
    main = folder / "main.py"
    assert "PATIENCE = 300" in main.read_text()
    main.write_text(main.read_text().replace("PATIENCE = 300", "PATIENCE = 2"))
    ended = run("-m", "openai/stall", "-m", MODELS[0])
    assert ended.returncode == 1
    assert ended.stderr == "openai/stall fell silent for 2 seconds.\n"
    assert "streaming: This is a stand-in" in ended.stdout


def test_a_gateway_that_hangs_up_in_the_middle_of_a_call(run) -> None:
    with impostor() as (port, _):
        ended = run("-m", MODELS[0], LLAMA_STACK_PORT=str(port))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"{NO_ANSWER}http://127.0.0.1:{port}: Server disconnected")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [f"{sys.executable} main.py", "make client"])
def test_a_reader_that_leaves(folder: Path, gateway: Gateway, command: str) -> None:
    settings = {"LLAMA_STACK_PORT": str(gateway.port), **KEY_VARIABLES}
    ended = run_in(folder, "sh", "-c", f"{command} | head -n 2", **settings)
    assert ended.returncode == 0
    assert "== openai/gpt-4o" in ended.stdout
    assert ended.stderr == ""


# --- on a terminal ---


class Terminal:
    """main.py on a terminal of its own, as a context manager. `shown` is what a person has seen so far."""

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        self.shown = ""
        self.controller, terminal = pty.openpty()
        command = ["setsid", "--ctty", sys.executable, "main.py", *arguments]
        screen = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        self.process = subprocess.Popen(command, cwd=folder, env=clean_environ(folder, **settings), **screen)
        os.close(terminal)

    def read_until(self, text: str, seconds: float = 60) -> None:
        """Read what is shown until `text` is, or until the program ends, which `text` is empty for."""
        deadline = time.monotonic() + seconds
        while not text or text not in self.shown:
            assert select.select([self.controller], [], [], max(0, deadline - time.monotonic()))[0], f"only: {self.shown}"
            try:
                self.shown += os.read(self.controller, 1000).decode()
            except OSError:  # Nobody has the terminal open any more.
                assert not text, f"it ended with: {self.shown}"
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.controller)


def test_tokens_are_shown_as_they_arrive(folder: Path, gateway: Gateway) -> None:
    """The first words of a slow stream are there while the rest is still to come."""
    with Terminal(folder, "-m", "openai/slow", LLAMA_STACK_PORT=str(gateway.port), **KEY_VARIABLES) as terminal:
        terminal.read_until("streaming: This is a ")
        assert "You said" not in terminal.shown.partition("streaming:")[2]
        terminal.read_until("")
        assert "You said" in terminal.shown.partition("streaming:")[2]
        assert terminal.process.wait(60) == 0


def test_ctrl_c_leaves_the_prompt_on_a_line_of_its_own(folder: Path, gateway: Gateway) -> None:
    settings = {"LLAMA_STACK_PORT": str(gateway.port), **KEY_VARIABLES}
    with Terminal(folder, "-m", "openai/every-1", **settings) as terminal:
        terminal.read_until("streaming: This is a ")
        os.write(terminal.controller, b"\x03")
        terminal.read_until("")
        assert terminal.process.wait(60) == 130
        assert terminal.shown.endswith("^C\r\n")
        assert "Traceback" not in terminal.shown
