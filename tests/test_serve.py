"""deploy/serve.sh, where the server cannot start or its surroundings fail it: a sentence and a true exit code."""

import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from conftest import Figure
from world.calls import ALL_KEYS, MODELS, chat, message
from world.gateway import PROJECT, Gateway, clean_environ, free_port
from world.vendors import Vendors

CHAT = "/v1/chat/completions"


def serve(folder: Path, home: Path, prefix: str = "", seconds: float = 60, **more: str) -> tuple[int, str]:
    """Run deploy/serve.sh where it cannot succeed: its exit code, as a shell has it, and all that it printed.

    `prefix` is put before it in a shell. Raises TimeoutExpired if it is still there after `seconds`.
    """
    environ = clean_environ(home, **{"LLAMA_STACK_PORT": str(free_port())} | more)
    script = f"{prefix} exec deploy/serve.sh"
    done = subprocess.run(
        ["sh", "-c", script], cwd=folder, env=environ, capture_output=True, text=True, timeout=seconds, check=False
    )
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    return code, done.stdout + done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_in_use_is_a_sentence(tmp_path: Path, figures: list[Figure], host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, dualstack_ipv6=":" in host) as rival:
        port = rival.getsockname()[1]
        start = time.monotonic()
        code, said = serve(PROJECT, tmp_path, LLAMA_STACK_PORT=str(port))
        seconds = time.monotonic() - start
    assert code == 1
    assert said == f"Port {port} is in use. Stop what listens there, or choose another with LLAMA_STACK_PORT.\n"
    if host == "127.0.0.1":
        figures.append(Figure("the port is in use", "a sentence, exit code 1", seconds, None))


@pytest.mark.slow
def test_a_port_in_use_on_another_address_is_none_of_our_business(tmp_path: Path, vendors: Vendors) -> None:
    with socket.create_server(("127.0.0.2", 0)) as neighbour:
        port = str(neighbour.getsockname()[1])
        with Gateway(tmp_path, LLAMA_STACK_PORT=port, **vendors.environ()) as gateway:
            assert gateway.answers()


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


@pytest.mark.slow
def test_a_broken_run_yaml_is_a_sentence_with_workers_too(project: Path, tmp_path: Path, figures: list[Figure]) -> None:
    """The exit code is that of uvicorn's supervisor, which has none but 0 when it is told to end."""
    (project / "run.yaml").write_text((project / "run.yaml").read_text().replace("remote::gemini", "remote::nobody"))
    start = time.monotonic()
    code, said = serve(project, tmp_path / "home", LLAMA_STACK_WORKERS="2")
    figures.append(
        Figure("run.yaml names an unknown provider, 2 workers", f"a sentence, exit code {code}", time.monotonic() - start, None)
    )
    assert "Provider `remote::nobody` is not available" in said
    assert "Traceback" not in said


def test_a_store_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path, figures: list[Figure]) -> None:
    """/proc: not even root may create a file there."""
    code, said = serve(PROJECT, tmp_path, SQLITE_STORE_DIR="/proc/self")
    assert code != 0
    assert said.startswith("The folder /proc/self cannot be used")
    assert "unable to open database file" in said
    assert "Traceback" not in said
    figures.append(Figure("the store folder is read-only", f"a sentence, exit code {code}", None, None))


def test_a_full_disk_stops_the_first_boot(tmp_path: Path, figures: list[Figure]) -> None:
    """A limit of 0 on the size of files stands in for a full disk: creating works, writing does not."""
    code, said = serve(PROJECT, tmp_path, prefix="trap '' XFSZ; ulimit -f 0;")
    assert code != 0
    assert "disk" in said
    assert "Traceback" not in said
    figures.append(Figure("the store folder's disk is full at the first boot", f"a sentence, exit code {code}", None, None))


def assert_serves_and_refuses(gateway: Gateway) -> None:
    """A good call is answered, and a vendor's error is passed on."""
    for _ in range(5):
        good = httpx.post(gateway.url + CHAT, headers=ALL_KEYS, json=chat(MODELS[0]), trust_env=False, timeout=60)
        assert good.is_success
        refused = httpx.post(gateway.url + CHAT, headers=ALL_KEYS, json=chat("openai/status-401"), trust_env=False, timeout=60)
        assert refused.status_code == 401
        assert "OpenAI says 401" in message(refused)


def test_a_log_that_cannot_be_written_stops_no_call(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    command = ("sh", "-c", "exec deploy/serve.sh > /dev/full 2>&1")
    with Gateway(tmp_path, command, **vendors.environ()) as gateway:
        assert_serves_and_refuses(gateway)
    figures.append(Figure("the log's disk is full", "serves, errors too", None, None))


@pytest.mark.slow
def test_a_full_disk_does_not_stop_the_next_boot(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    with Gateway(tmp_path, **vendors.environ()):
        pass
    command = ("sh", "-c", "trap '' XFSZ; ulimit -f 0; exec deploy/serve.sh > /dev/full 2>&1")
    with Gateway(tmp_path, command, **vendors.environ()) as gateway:
        assert_serves_and_refuses(gateway)
    figures.append(Figure("the store folder's disk is full at a later boot", "boots and serves", None, None))
