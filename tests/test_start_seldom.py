"""What shows only seldom: other signals than the usual two, exit codes after two, and what only some operators have set."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import trustme
import yaml
from support.callers import Stream
from support.calls import RUN_YAML, message
from support.gateway import (
    ALONE,
    BOTH_DOORS,
    HAPROXY,
    NOWHERE,
    PROJECT,
    START,
    Gateway,
    clean_environ,
    family,
    free_port,
    listening,
    wait_for,
)
from support.haproxy import NEEDS_HAPROXY
from support.vendors import KEYS

FEW_FILES = ("sh", "-c", f"ulimit -Sn 256; exec {' '.join(START)}")


def find(gateway: Gateway, word: str) -> psutil.Process | None:
    """The process of a gateway that has this in its command line."""
    for each in family(gateway.process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word in part for part in each.cmdline()):
                return each
    return None


@contextlib.contextmanager
def just_begun(home: Path, command: tuple[str, ...] = START, **settings: str) -> Iterator[Gateway]:
    """A gateway that has started its processes, and takes no call yet."""
    gateway = Gateway(home, command, **BOTH_DOORS | settings)
    gateway.launch()
    try:
        wait_for(lambda: find(gateway, "-db") and gateway.servers(), seen=lambda: gateway.log)
        yield gateway
    finally:
        gateway.stop(3)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway that has just begun, from a shell that allows few open files, for callers of other machines too."""
    with just_begun(tmp_path_factory.mktemp("begun"), FEW_FILES, LLAMA_STACK_HOST="0.0.0.0") as gateway:
        yield gateway


def can_listen(address: str, port: int) -> bool:
    """Whether somebody else could listen there."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            rival.bind((address, port))
            rival.listen()
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


# --- Signals and exit codes ---


@NEEDS_HAPROXY
def test_other_signals_let_streams_finish_too(tmp_path: Path, egress: dict[str, str]) -> None:
    """SIGHUP, of a terminal that is closed. Once the server has ended the front refuses, rather than leave callers waiting."""
    with Gateway(tmp_path, **egress) as gateway:
        chat = Stream(gateway, "openai/slow", "one two three")
        key = {"Authorization": f"Bearer {KEYS['openai']}"}
        native = Stream(gateway, "slow", "one two three " * 4, "/openai/v1/chat/completions", key)
        server = psutil.Process(gateway.server)
        gateway.process.send_signal(signal.SIGHUP)
        chat.join(60)
        assert chat.finished, (chat.problem, chat.lines[-3:])
        server.wait(20)
        wait_for(lambda: not listening(gateway.port), 10, seen=lambda: f"{native.is_alive()}: {listening(gateway.port)}")
        assert native.is_alive(), "the port was closed when all was over"
        native.join(60)
        assert native.finished, (native.problem, native.lines[-3:])
        assert gateway.process.wait(20) == 0


@NEEDS_HAPROXY
def test_when_haproxy_is_killed_the_exit_code_tells(tmp_path: Path) -> None:
    """So that systemd starts it again."""
    with Gateway(tmp_path, **NOWHERE) as gateway:
        haproxy = find(gateway, "-db")
        assert haproxy
        haproxy.kill()
        assert gateway.process.wait(20) == 1
        assert "The HAProxy has ended, and the gateway with it." in gateway.log


@NEEDS_HAPROXY
def test_a_server_that_is_killed_before_it_is_up_is_no_wrong_setting(tmp_path: Path) -> None:
    """By the kernel, say, when memory is short: systemd tries again after 1, and not after 2."""
    with just_begun(tmp_path) as gateway:
        os.kill(gateway.server, signal.SIGKILL)
        assert gateway.process.wait(20) == 1
        assert "The server did not start." in gateway.log


def test_a_gateway_whose_log_nobody_reads_ends(tmp_path: Path) -> None:
    """Its pipe is full from the beginning."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(1024))
    os.set_blocking(writing, True)
    environ = clean_environ(tmp_path, LLAMA_STACK_PORT=str(free_port()), **ALONE, **NOWHERE)
    with subprocess.Popen(START, env=environ, stdout=writing, stderr=subprocess.DEVNULL, cwd=PROJECT) as start:
        try:
            wait_for(lambda: len(family(start.pid)) >= 2)
            start.terminate()
            assert start.wait(20) == 0
        finally:
            start.kill()
            for descriptor in (reading, writing):
                os.close(descriptor)


# --- Who else could be there ---


@NEEDS_HAPROXY
@pytest.mark.parametrize("word", ["run.yaml", "kill -KILL 0"], ids=["server", "watchdog"])
def test_while_one_of_them_lives_nobody_else_gets_the_port_to_which_keys_are_sent(begun: Gateway, word: str) -> None:
    """Whatever else has ended, in whatever order: each has inherited the egress door's listening socket."""
    process = find(begun, word)
    assert process, family(begun.process.pid)
    held = {each.laddr for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", begun.port + 1) in held, held


@NEEDS_HAPROXY
@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_nobody_else_becomes_localhost(begun: Gateway) -> None:
    """`localhost` is ::1 to many clients, which would send their keys there."""
    assert not can_listen("::1", begun.port)


@NEEDS_HAPROXY
def test_behind_a_front_the_server_is_for_this_machine_alone(begun: Gateway) -> None:
    assert begun.environ["LLAMA_STACK_HOST"] == "127.0.0.1"
    assert listening(begun.port) == ["0.0.0.0"]


@NEEDS_HAPROXY
@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_listening_on_every_ipv6_address_serves_ipv4_too(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, LLAMA_STACK_HOST="::", **BOTH_DOORS)

    def connected() -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", gateway.port)) == 0

    assert gateway.environ_at_start(connected)


@NEEDS_HAPROXY
def test_nobody_else_finds_haproxys_admin_socket(begun: Gateway) -> None:
    assert not [path for path in begun.home.rglob("*") if path.is_socket()]


@NEEDS_HAPROXY
def test_the_server_may_open_as_many_files_as_it_can_be_given(begun: Gateway) -> None:
    """Each connection is one, and the server never closes an idle one."""
    for process in (begun.server, begun.process.pid):
        soft, hard = psutil.Process(process).rlimit(psutil.RLIMIT_NOFILE)
        assert soft == (65_536 if hard == -1 else min(65_536, hard))


# --- What only some have ---


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


@NEEDS_HAPROXY
def test_the_egress_door_takes_the_vendors_that_it_knows_and_no_other(tmp_path: Path, project: Path) -> None:
    """Not one that the operator has led elsewhere, nor one that is in run.yaml alone."""
    more = {
        "provider_id": "even",
        "provider_type": "remote::passthrough",
        "config": {"base_url": "${env.EVEN_PASSTHROUGH_URL:=https://even.example}"},
    }
    providers = RUN_YAML["providers"] | {"inference": [*RUN_YAML["providers"]["inference"], more]}
    (project / "run.yaml").write_text(yaml.safe_dump(RUN_YAML | {"providers": providers}))
    gateway = Gateway(tmp_path / "home", cwd=project, OPENAI_PASSTHROUGH_URL="https://ours.example", **BOTH_DOORS)
    environ = gateway.environ_at_start()
    door = f"http://127.0.0.1:{gateway.port + 1}"
    assert {name: value for name, value in environ.items() if name.endswith("_PASSTHROUGH_URL")} == {
        "OPENAI_PASSTHROUGH_URL": "https://ours.example",
        "GEMINI_PASSTHROUGH_URL": f"{door}/gemini/v1beta/openai",
        "ANTHROPIC_PASSTHROUGH_URL": f"{door}/anthropic",
    }


@NEEDS_HAPROXY
def test_native_paths_are_closed_behind_an_operators_proxy(tmp_path: Path) -> None:
    """HAProxy would go past it."""
    with just_begun(tmp_path, **NOWHERE) as gateway:
        response = httpx.post(
            f"{gateway.url}/openai/v1/x", headers={"Authorization": "Bearer sk-fake"}, trust_env=False, timeout=60
        )
        assert response.status_code == 503
        assert "HTTPS_PROXY" in message(response)
