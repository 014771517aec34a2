"""main.py, as its users run it."""

import os
import pty
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from world.calls import EMBEDDINGS, MODELS
from world.gateway import PROJECT, Gateway, clean_environ, free_port
from world.vendors import KEY_VARIABLES, KEYS, Vendors


@pytest.fixture
def run(tmp_path: Path, gateway: Gateway):
    """Run a copy of main.py beside a .env file with `keys`, and return the ended process.

    It is a copy because main.py reads the .env beside it, and the one in this folder may have real keys.
    """
    (tmp_path / "main.py").write_bytes((PROJECT / "main.py").read_bytes())

    def run(*arguments: str, keys: dict[str, str] = KEY_VARIABLES, port: int | str = gateway.port) -> subprocess.CompletedProcess:
        (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in keys.items()))
        environ = clean_environ(tmp_path, LLAMA_STACK_PORT=str(port))
        command = [sys.executable, str(tmp_path / "main.py"), *arguments]
        ended = subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in ended.stderr
        assert not any(key in ended.stdout + ended.stderr for key in keys.values() if key)
        return ended

    return run


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


def test_help(run) -> None:
    ended = run("--help")
    assert ended.returncode == 0
    assert "--model" in ended.stdout


@pytest.mark.parametrize("missing", ["OPENAI_API_KEY", "GEMINI_API_KEY", "ANTHROPIC_API_KEY"])
def test_a_missing_key_is_named_and_stops_no_other_vendor(run, missing: str) -> None:
    ended = run(keys={name: value for name, value in KEY_VARIABLES.items() if name != missing})
    assert ended.returncode == 0
    assert f"{missing} is not set" in ended.stdout
    assert "stand-in for" in ended.stdout


def test_a_missing_key_for_the_model_that_was_asked_for_is_a_failure(run) -> None:
    ended = run("-m", "openai/gpt-4o", keys={"GEMINI_API_KEY": KEYS["gemini"]})
    assert ended.returncode == 1
    assert "OPENAI_API_KEY is not set" in ended.stderr


def test_no_key_at_all(run) -> None:
    ended = run(keys={})
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert all(name in ended.stderr for name in [*KEY_VARIABLES, ".env.example"])


@pytest.mark.parametrize("name", KEY_VARIABLES)
def test_a_wrong_key_is_named_and_stops_no_other_vendor(run, name: str) -> None:
    ended = run(keys=KEY_VARIABLES | {name: "sk-fake-wrong"})
    assert ended.returncode == 1
    assert f"Check {name} in .env." in ended.stderr
    assert ended.stdout.count("streaming: This is a stand-in") == 5 - {"OPENAI_API_KEY": 3}.get(name, 1)


def test_a_port_that_is_none(run) -> None:
    ended = run(port="none")
    assert ended.returncode == 1
    assert "No gateway answers at http://localhost:none" in ended.stderr


def test_a_reader_that_leaves(gateway: Gateway, tmp_path: Path) -> None:
    environ = clean_environ(tmp_path, LLAMA_STACK_PORT=str(gateway.port), **KEY_VARIABLES)
    command = ["sh", "-c", f"{sys.executable} main.py | head -n 2"]
    ended = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert "== openai/gpt-4o" in ended.stdout
    assert ended.stderr == ""


def test_no_gateway(run) -> None:
    ended = run(port=free_port())
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "make server" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>hello</html>"), (200, b"[]"), (404, b"{}")])
def test_something_else_on_the_port(run, status: int, body: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        """Any other web server."""

        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        ended = run(port=other.server_port)
        other.shutdown()
    assert ended.returncode == 1
    assert "is not the gateway" in ended.stderr


def test_a_gateway_that_wants_a_token(run, tmp_path: Path, vendors: Vendors) -> None:
    with Gateway(tmp_path / "team", AUTH_JWKS_URI="http://127.0.0.1:9/jwks", **vendors.environ()) as team:
        ended = run(port=team.port)
    assert ended.returncode == 1
    assert "wants a token of your identity provider" in ended.stderr


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("openai/status-429", "answered 429: "),
        ("gemini/status-503", "Google says 503."),
        ("anthropic/status-500", "Anthropic says 500."),
        ("openai/no-such-model", "answered 404: "),
        ("nobody/anything", "answered 404: "),
        ("openai/html", "502 Bad Gateway"),
        ("openai/hang-up", "answered 500: "),
    ],
)
def test_a_vendors_error_is_one_sentence_and_stops_no_other_model(run, model: str, words: str) -> None:
    ended = run("-m", model, "-m", MODELS[0])
    assert ended.returncode == 1
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith(model)
    assert words in sentence
    assert "streaming: This is a stand-in" in ended.stdout


@pytest.mark.parametrize("model", ["openai/no-finish", "openai/error-event"])
def test_a_stream_cut_short_is_a_failure_and_not_an_answer(run, model: str) -> None:
    ended = run("-m", model)
    assert ended.returncode == 1
    assert f"{model} broke off its answer" in ended.stderr
    assert "streaming: This is a" in ended.stdout


def test_tokens_are_shown_as_they_arrive(gateway: Gateway, tmp_path: Path) -> None:
    """On a terminal: the first words of a slow stream are there while the rest is still to come."""
    controller, terminal = pty.openpty()
    environ = clean_environ(tmp_path, LLAMA_STACK_PORT=str(gateway.port), **KEY_VARIABLES)
    command = [sys.executable, "main.py", "-m", "openai/slow"]
    with subprocess.Popen(command, cwd=PROJECT, env=environ, stdout=terminal) as process:
        shown = ""
        while "streaming: This is a " not in shown:
            shown += os.read(controller, 1000).decode()
        assert "You said" not in shown.partition("streaming:")[2]
        assert process.wait(60) == 0
    os.close(terminal)
    os.close(controller)
