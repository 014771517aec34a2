"""main.py, as its users run it."""

import json
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme
from support.calls import EMBEDDINGS, MODELS
from support.gateway import PROJECT, PROVIDER_DATA, Gateway, clean_environ, free_port
from support.services import Services
from support.terminal import Terminal
from support.vendors import KEY_VARIABLES, KEYS, Vendors

MAIN = PROJECT / "main.py"
PYTHON = (sys.executable, "main.py")
MAKE = ("make", "client")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the client with no .env: main.py reads the one beside it, and the one in this project may have real keys."""
    for name in ("main.py", "Makefile", "pyproject.toml", "uv.lock", ".python-version"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def env_file(keys: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in keys.items())


@pytest.fixture
def run(folder: Path, gateway: Gateway):
    """Run main.py beside a .env file, in an environment with `settings`, and return the ended process.

    It may print no traceback and no key.
    """

    def run(
        *arguments: str, env: str | bytes = env_file(KEY_VARIABLES), command: tuple[str, ...] = PYTHON, **settings: str
    ) -> subprocess.CompletedProcess:
        (folder / ".env").write_bytes(env if isinstance(env, bytes) else env.encode())
        environ = clean_environ(folder, **{"LLAMA_STACK_PORT": str(gateway.port)} | settings)
        pipes = {"capture_output": True, "text": True, "timeout": 120}
        ended = subprocess.run([*command, *arguments], env=environ, cwd=folder, check=False, **pipes)
        assert "Traceback" not in ended.stderr
        assert not any(key in ended.stdout + ended.stderr for key in KEY_VARIABLES.values())
        return ended

    return run


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


def asked_for(models: list[str]) -> list[str]:
    """The arguments that name these models."""
    return [argument for model in models for argument in ("-m", model)]


def headings(ended: subprocess.CompletedProcess) -> list[str]:
    """The models that were asked."""
    return [line.removeprefix("== ") for line in ended.stdout.splitlines() if line.startswith("== ")]


# --- what it asks ---


def test_it_is_a_lesson_of_under_200_lines() -> None:
    assert len(MAIN.read_text().splitlines()) < 200


def test_asks_every_model_in_both_ways_and_for_both_embeddings(run) -> None:
    ended = run("Why is the sky blue?")
    assert (ended.returncode, ended.stderr, headings(ended)) == (0, "", MODELS + EMBEDDINGS)
    for manner in ("regular", "streaming"):
        answers = [line for line in ended.stdout.splitlines() if line.startswith(f"{manner}:")]
        assert len(answers) == len(MODELS)
        assert all(answer.endswith("You said: Why is the sky blue?") for answer in answers)
    assert ended.stdout.count("embedding: 8 numbers") == 2


def test_asks_only_the_models_that_are_named(run) -> None:
    """One without a provider is an error, and one whose name says so gets an embeddings call."""
    named = [MODELS[-1], "openai/some-other-model", "openai/text-embedding-3-large"]
    ended = run("-m", "gpt-4o", "--model", *asked_for(named)[1:])
    assert (ended.returncode, headings(ended)) == (1, named)
    assert ended.stderr == "gpt-4o: models are named provider/model, such as openai/gpt-4o.\n"
    assert "not some-other-model itself" in ended.stdout
    assert "\n== openai/text-embedding-3-large\nembedding: 8 numbers" in ended.stdout


def test_help(run) -> None:
    ended = run("--help")
    assert (ended.returncode, "--model" in ended.stdout) == (0, True)


@pytest.mark.parametrize("prompt", ['It\'s $5, "quoted" & $(shell touch x) `touch x`; #1\nb', "-m"])
def test_make_passes_a_prompt_and_models_on(folder: Path, run, prompt: str) -> None:
    ended = run(f"PROMPT={prompt}", f"MODEL={MODELS[0]} {MODELS[-1]}", command=MAKE)
    assert (ended.returncode, ended.stderr, headings(ended)) == (0, "", [MODELS[0], MODELS[-1]])
    assert ended.stdout.count(f"You said: {prompt}\n") == 4
    assert not (folder / "x").exists()


def test_a_prompt_of_the_shells_own_is_no_prompt(run) -> None:
    ended = run(command=MAKE, PROMPT="%n@%m")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "You said: Say hello" in ended.stdout


# --- keys ---


def test_a_missing_key_is_named_and_stops_no_other_vendor(run) -> None:
    """In a file as editors write it: with a byte order mark, spaces, CRLF, quotes, `export` and a variable that is empty."""
    file = f"\ufeffOPENAI_API_KEY = {KEYS['openai']}\r\nANTHROPIC_API_KEY=\r\nexport GEMINI_API_KEY='{KEYS['gemini']}'"
    ended = run(env=file, OPENAI_API_KEY="")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"Skipped {MODELS[-1]}: ANTHROPIC_API_KEY is not set" in ended.stdout
    assert headings(ended) == MODELS[:-1] + EMBEDDINGS


def test_a_missing_key_for_the_model_that_was_asked_for_is_a_failure(run) -> None:
    ended = run(*asked_for(["openai/gpt-4o", "gemini/any"]), env=env_file({"ANTHROPIC_API_KEY": KEYS["anthropic"]}))
    assert (ended.returncode, headings(ended)) == (1, [])
    assert ended.stderr == (
        "Skipped openai/gpt-4o: OPENAI_API_KEY is not set in .env.\nSkipped gemini/any: GEMINI_API_KEY is not set in .env.\n"
    )


def test_a_wrong_key_is_told_once_and_stops_no_other_vendor(run) -> None:
    ended = run(env=env_file(dict.fromkeys(KEY_VARIABLES, "sk-fake-wrong")))
    assert ended.returncode == 1
    page = "https://platform.openai.com/account/api-keys"
    assert ended.stderr.splitlines() == [
        f"openai/gpt-4o answered 401: Incorrect API key provided. You can find your API key at {page}. Check OPENAI_API_KEY in .env.",
        "gemini/gemini-2.5-flash-lite answered 400: API key not valid. Please pass a valid API key. Check GEMINI_API_KEY in .env.",
        "anthropic/claude-haiku-4-5-20251001 answered 401: invalid x-api-key Check ANTHROPIC_API_KEY in .env.",
    ]


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


def test_no_proxy_comes_between_on_this_machine(run, gateway: Gateway) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for url in ("", f"http://localhost:{gateway.port}/v1/"):
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
    authority, pem, ca = trustme.CA(), tmp_path / "tls.pem", tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    with Services() as services:
        settings = {f"LLAMA_STACK_TLS_{half}FILE": str(pem) for half in ("CERT", "KEY")} | {
            "AUTH_JWKS_URI": f"{services.url}/jwks"
        }
        team = Gateway(tmp_path / "team", **settings, **vendors.environ())
        team.trust = ssl.create_default_context(cafile=ca)
        with team:
            https, trusted = {"LLAMA_STACK_BASE_URL": team.url}, {"SSL_CERT_FILE": str(ca)}
            wants = f"The gateway at {team.url} wants a valid token of your identity provider in LLAMA_STACK_API_KEY.\n"
            for token, code, said in ((services.token(), 0, ""), ("", 1, wants), (services.token(exp=1), 1, wants)):
                ended = run("-m", MODELS[0], **https, **trusted, LLAMA_STACK_API_KEY=token)
                assert (ended.returncode, ended.stderr) == (code, said)

            untrusted = run("-m", MODELS[0], **https).stderr
            assert "CERTIFICATE_VERIFY_FAILED" in untrusted
            assert "SSL_CERT_FILE if its CA is a private one" in untrusted
            ended = run("-m", MODELS[0], LLAMA_STACK_PORT=str(team.port))
            assert ended.stderr.startswith(f"No gateway answers at http://127.0.0.1:{team.port}: ")
            assert "If it speaks TLS, set LLAMA_STACK_BASE_URL=https://" in ended.stderr
            assert (ended.returncode, ended.stdout) == (1, "")


ADDRESS = "LLAMA_STACK_BASE_URL"
NO_KEY = (
    "There is no key. Copy .env.example to .env, and fill in at least one: OPENAI_API_KEY, GEMINI_API_KEY, ANTHROPIC_API_KEY."
)
ODD_KEY = "has a character in it that no key has"


@pytest.mark.parametrize(
    ("env", "settings", "words"),
    [
        ("", {}, NO_KEY),
        (env_file(KEY_VARIABLES).encode("utf-16"), {}, "The file .env cannot be read: "),
        (None, {"OPENAI_API_KEY": "sk fake"}, f"OPENAI_API_KEY {ODD_KEY}"),
        (None, {"ANTHROPIC_API_KEY": "“sk-fake”"}, f"ANTHROPIC_API_KEY {ODD_KEY}"),
        (None, {"LLAMA_STACK_API_KEY": "sk-fäke\tkey"}, f"LLAMA_STACK_API_KEY {ODD_KEY}"),
        (None, {"LLAMA_STACK_PORT": "none"}, "Invalid port: 'none'. Start it with make server, and check LLAMA_STACK_PORT."),
        (None, {"LLAMA_STACK_PORT": "99999999999"}, "check LLAMA_STACK_PORT."),
        (None, {ADDRESS: "gateway.example.com"}, f"Check {ADDRESS}"),
        (None, {ADDRESS: "http://"}, f"Check {ADDRESS}"),
        (None, {ADDRESS: "https://127.0.0.1:1", "SSL_CERT_FILE": "/nowhere"}, "CA that the environment names cannot be used"),
        (None, {ADDRESS: "http://gateway.invalid", "HTTP_PROXY": "odd://a"}, "proxy or the CA that the environment names"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(run, env: str | bytes | None, settings: dict[str, str], words: str) -> None:
    ended = run(env=env_file(KEY_VARIABLES | settings) if env is None else env, **settings)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (1, "", 1), ended
    assert words in ended.stderr


def test_no_gateway(run) -> None:
    """It is 127.0.0.1, whoever else may be localhost."""
    port = free_port()
    ended = run(LLAMA_STACK_PORT=str(port))
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (1, "", 1), ended
    assert ended.stderr.startswith(f"No gateway answers at http://127.0.0.1:{port}: ")
    assert "Start it with make server" in ended.stderr


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>hello</html>"), (200, b"[]"), (404, b"{}")])
def test_something_else_on_the_port(run, status: int, body: bytes) -> None:
    with impostor(status, body) as (port, seen):
        ended = run(LLAMA_STACK_PORT=str(port))
    assert ended.returncode == 1
    assert "is not the gateway" in ended.stderr
    assert not any(PROVIDER_DATA in headers for _, headers in seen)


# --- what can go wrong on the way ---

FAILURES = {
    "openai/status-429": "answered 429: OpenAI says 429.",
    "gemini/status-503": "answered 503: Google says 503.",
    "anthropic/status-500": "answered 500: Anthropic says 500.",
    "openai/no-such-model": "answered 404: The model `no-such-model` does not exist or you do not have access to it.",
    "nobody/anything": "answered 404: Model 'nobody/anything' not found. Use 'client.models.list()' to list available Models.",
    "openai/html": "answered 502: <html><body><h1>502 Bad Gateway</h1></body></html>",
    "openai/hang-up": "answered 500: Internal server error: An unexpected error occurred.",
    "openai/no-finish": "broke off its answer: the stream ended without a finish_reason.",
    "openai/error-event": "broke off its answer: Internal server error: An unexpected error occurred.",
    "openai/stall": "fell silent for 8 seconds.",
}


def test_a_failure_is_one_sentence_and_stops_no_other_model(folder: Path, run) -> None:
    """An answer that breaks off is one too, and so is silence."""
    assert MAIN.read_text().count("PATIENCE = 300") == 1
    (folder / "main.py").write_text(MAIN.read_text().replace("PATIENCE = 300", "PATIENCE = 8"))
    ended = run(*asked_for([*FAILURES, MODELS[0]]))
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [f"{model} {sentence}" for model, sentence in FAILURES.items()]
    assert ended.stdout.count("streaming: This is a") == 3, "two have begun, and one follows that is whole"


def test_a_gateway_that_hangs_up_in_the_middle_of_a_call(run) -> None:
    with impostor() as (port, _):
        ended = run("-m", MODELS[0], LLAMA_STACK_PORT=str(port))
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert ended.stderr.startswith(f"No gateway answers at http://127.0.0.1:{port}: Server disconnected")


def test_a_reader_that_leaves(run) -> None:
    ended = run(command=("sh", "-c", "make client | head -n 2"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "== openai/gpt-4o" in ended.stdout


def test_words_are_shown_as_they_arrive_and_ctrl_c_leaves_the_prompt_on_a_line_of_its_own(folder: Path, gateway: Gateway) -> None:
    environ = clean_environ(folder, LLAMA_STACK_PORT=str(gateway.port), **KEY_VARIABLES)
    with Terminal((*PYTHON, "-m", "openai/every-1"), environ, folder) as terminal:
        terminal.wait_for("streaming: This is a ", 60)
        assert "You said" not in terminal.screen.partition("streaming:")[2]
        terminal.press(b"\x03")
        assert terminal.wait() == 130
        assert terminal.screen.endswith("^C\n")
        assert "Traceback" not in terminal.screen
