"""Which doors HAProxy opens, what it is told, and what its processes hold once they have begun.

For the first, a HAProxy that only says its version and how it was started stands in for one, so that nothing is booted.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
import yaml
from support.calls import RUN_YAML, message
from support.gateway import (
    BOTH_DOORS,
    HAPROXY,
    NOWHERE,
    PROJECT,
    START,
    Gateway,
    clean_environ,
    free_port,
    listening,
    refused,
    wait_for,
)
from support.haproxy import NEEDS_HAPROXY
from support.parts import Running, can_listen, just_begun

PROXY = {"HTTPS_PROXY": "http://ann:fake-secret@proxy.example:3128"}
NEW = "HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https://haproxy.org/"
OLD = "HAProxy version 2.5.14"
NONE = ""

MISSING = "HAProxy 2.6 or later is not installed: keys in the header only, no native paths, no page. sudo apt-get install haproxy"
THROUGH_A_PROXY = "HTTPS_PROXY is set, and HAProxy cannot go through another proxy: no egress door, no native paths."
EGRESS, FRONT = "egress.cfg", "front.cfg"

FEW_FILES = ("sh", "-c", f"ulimit -Sn 256; exec {' '.join(START)}")

# Where systems keep all CAs in one file: Debian, Fedora, openSUSE, Alpine and macOS.
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class Row(NamedTuple):
    """What HAProxy says, what is set, the doors that open, and what is said of one that does not."""

    version: str
    settings: dict[str, str]
    opened: tuple[str, ...]
    said: str = ""


TABLE = [
    Row(NEW, {}, (EGRESS, FRONT)),
    Row(NEW, {"FRONT": "1", "EGRESS": "1"}, (EGRESS, FRONT)),
    Row(NEW, {"FRONT": "0"}, (EGRESS,)),
    Row(NEW, {"EGRESS": "0"}, (FRONT,)),
    Row(NEW, {"FRONT": "0", "EGRESS": "0"}, ()),
    Row(NEW, PROXY, (FRONT,), THROUGH_A_PROXY),
    Row(NEW, {"all_proxy": "http://proxy.example:3128"}, (FRONT,), THROUGH_A_PROXY),
    Row(NEW, PROXY | {"EGRESS": "0"}, (FRONT,)),
    Row(NEW, PROXY | {"FRONT": "0"}, (), THROUGH_A_PROXY),
    Row(OLD, {}, (), MISSING),
    Row(NONE, {}, (), MISSING),
    Row(NONE, {"FRONT": "0"}, ()),
    Row(NONE, PROXY, (), MISSING),
]


def path_with(folder: Path, version: str) -> str:
    """A search path on which the first HAProxy says this as its version, and notes how it is started."""
    stub = folder / "tools" / "haproxy"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(
        f"#!/bin/sh\n[ \"$1\" != -v ] || {{ echo '{version}'; exit; }}\nenv > '{folder}/had'; echo \"$@\" > '{folder}/ran'\nsleep 60\n"
    )
    stub.chmod(0o755)
    return f"{stub.parent}{os.pathsep}{clean_environ(folder)['PATH']}"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.version[:19]} {' '.join(row.settings)}")
def test_which_doors_open(tmp_path: Path, row: Row) -> None:
    gateway = Gateway(tmp_path, PATH=path_with(tmp_path, row.version), **row.settings)
    ran = tmp_path / "ran"
    environ = gateway.environ_at_start(lambda: not row.opened or (ran.exists() and ran.read_text()))
    files = [word for word in ran.read_text().split() if word.endswith(".cfg")] if ran.exists() else []
    assert files == (["global.cfg", "vendors.cfg", *row.opened] if row.opened else [])
    # The server is behind the front at another port, and reaches the vendors through the egress door.
    assert (environ["LLAMA_STACK_PORT"] == str(gateway.port)) == (FRONT not in row.opened)
    door = f"http://127.0.0.1:{gateway.port + 1}"
    assert environ.get("OPENAI_PASSTHROUGH_URL") == (f"{door}/openai" if EGRESS in row.opened else None)
    assert environ.get("GEMINI_PASSTHROUGH_URL") == (f"{door}/gemini/v1beta/openai" if EGRESS in row.opened else None)
    for sentence in (MISSING, THROUGH_A_PROXY):
        assert (sentence in gateway.log) == (sentence == row.said), gateway.log
    assert "fake-secret" not in gateway.log


@pytest.mark.parametrize(
    ("version", "demand"),
    [
        ("HA-Proxy version 1.8.8", "FRONT=1"),
        ("HA-Proxy version 2.2.9-2+deb11u6 2023/08/17", "EGRESS=1"),
        (OLD, "FRONT=yes"),
        (NONE, "EGRESS=true"),
        ("no version 9", "FRONT=1"),
    ],
)
def test_a_door_that_is_demanded_needs_a_new_haproxy(tmp_path: Path, version: str, demand: str) -> None:
    door, value = demand.split("=")
    said = refused(tmp_path, PATH=path_with(tmp_path, version), **{door: value})
    assert said.startswith(f"{door}=1 needs HAProxy 2.6 or later. Install it: sudo apt-get install haproxy (Debian, Ubuntu), ")
    assert said.endswith(f"sudo dnf install haproxy (Fedora), brew install haproxy (macOS). Or start with {door}=0.\n")


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("HAProxy version 2.6.0", "HTTPS_PROXY"),
        ("HAProxy version 2.10.1", "https_proxy"),
        ("HAProxy version 3.0.5-8e879a5", "ALL_PROXY"),
        (NEW, "all_proxy"),
    ],
)
def test_an_egress_door_that_is_demanded_cannot_go_through_a_proxy(tmp_path: Path, version: str, name: str) -> None:
    """Which is the next thing that is refused, where HAProxy is new enough."""
    said = refused(tmp_path, PATH=path_with(tmp_path, version), EGRESS="1", **{name: PROXY["HTTPS_PROXY"]})
    assert said.startswith("The egress door connects to the vendors itself, past the proxy")
    assert "EGRESS=0" in said
    assert "proxy.example" not in said


def test_the_egress_port_is_the_next_one_and_can_be_another(tmp_path: Path) -> None:
    path, port = path_with(tmp_path, NEW), free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        taken = f"Port {port + 1}, where the egress door is to listen, is in use. Choose another with EGRESS_PORT.\n"
        assert refused(tmp_path, PATH=path, LLAMA_STACK_PORT=str(port)) == taken
        assert refused(tmp_path, PATH=path, EGRESS_PORT=str(port + 1)) == taken
        said = refused(tmp_path, PATH=path, EGRESS="0", EGRESS_PORT=str(port + 1), LLAMA_STACK_PORT=str(port + 1))
        assert said.startswith(f"Port {port + 1} is in use."), "the port of a door that is not wanted is nobody's business"


def test_haproxy_trusts_whom_the_operator_trusts(tmp_path: Path) -> None:
    """With nothing set, a bundle of the system's if there is one: without it HAProxy finds CAs on Debian only."""
    path, ran = path_with(tmp_path, NEW), tmp_path / "ran"

    def trusted(**settings: str) -> str | None:
        ran.unlink(missing_ok=True)
        Gateway(tmp_path, PATH=path, **settings).environ_at_start(ran.exists)
        return dict(line.split("=", 1) for line in (tmp_path / "had").read_text().splitlines()).get("EGRESS_CA")

    bundles = [file for file in BUNDLES if Path(file).exists()]
    assert trusted() == (bundles[0] if bundles else None)
    assert trusted(SSL_CERT_DIR="/hashed") == "/hashed"
    assert trusted(SSL_CERT_DIR="/hashed", SSL_CERT_FILE="/bundle") == "/bundle"
    assert trusted(SSL_CERT_FILE="/bundle", EGRESS_CA="/vendors") == "/vendors"


def test_ctrl_c_while_there_is_nothing_to_end_is_no_traceback(tmp_path: Path) -> None:
    """While it looks for HAProxy, say."""
    path = path_with(tmp_path, NEW)
    stub, asked = tmp_path / "tools" / "haproxy", tmp_path / "asked"
    stub.write_text(f"#!/bin/sh\ntouch '{asked}'\nexec sleep 60\n")
    gateway = Gateway(tmp_path, PATH=path)
    gateway.launch()
    try:
        wait_for(asked.exists, seen=lambda: gateway.log)
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.process.wait(20) == -signal.SIGINT
        assert gateway.log == ""
    finally:
        gateway.stop(0)


def test_haproxy_is_told_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """No key, and nothing else that it could print or hand on."""
    told = {
        "LLAMA_STACK_HOSTS": "a.example,b.example",
        "LLAMA_STACK_CORS_ORIGIN": "https://a.example",
        "FRONT_BODY_LIMIT": "1000",
    }
    told |= {"GEMINI_PASSTHROUGH_URL": "https://g.example", "AUTH_JWKS_URI": "https://id.example/jwks", "SSL_CERT_FILE": "ca.pem"}
    more = {"OPENAI_API_KEY": "sk-fake", "LD_PRELOAD": "", "EGRESS_PORT": ""}
    gateway = Gateway(tmp_path, PATH=path_with(tmp_path, NEW), **told, **more)
    gateway.environ_at_start((tmp_path / "ran").exists)
    had = dict(line.split("=", 1) for line in (tmp_path / "had").read_text().splitlines())
    inherited = {"FRONT_BIND", "EGRESS_BIND", "HAPROXY_SOCKET", "GATEWAY_A"}
    assert {name: value for name, value in had.items() if name not in {*inherited, "PWD", "OLDPWD", "_", "SHLVL"}} == {
        "START": "1",
        "START_WORKERS": "1",
        "PATH": os.defpath,
        "LLAMA_STACK_HOSTS": "a.example b.example",
        "LLAMA_STACK_CORS_ORIGIN": "https://a.example",
        "FRONT_BODY_LIMIT": "1000",
        "GEMINI_PASSTHROUGH_URL": "https://g.example",
        "AUTH_JWKS_URI": "https://id.example/jwks",
        "EGRESS_CA": str(PROJECT / "ca.pem"),
    }
    assert all(had[name].startswith("fd@") for name in ("FRONT_BIND", "EGRESS_BIND", "HAPROXY_SOCKET"))
    assert had["PWD"] == str(PROJECT / "deploy" / "haproxy")


@NEEDS_HAPROXY
@pytest.mark.parametrize("doors", [(EGRESS,), (FRONT,), (EGRESS, FRONT)], ids=" ".join)
def test_haproxy_finds_nothing_to_say_about_the_configuration(tmp_path: Path, doors: tuple[str, ...]) -> None:
    files = [
        word for name in ("global.cfg", "vendors.cfg", *doors) for word in ("-f", str(PROJECT / "deploy" / "haproxy" / name))
    ]
    said = subprocess.run(
        [HAPROXY, "-c", *files], check=False, env=clean_environ(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 0, said.stderr
    assert "WARNING" not in said.stderr


# --- What the processes hold ---


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway that has just begun, from a shell that allows few open files, for callers of other machines too."""
    with just_begun(tmp_path_factory.mktemp("begun"), FEW_FILES, LLAMA_STACK_HOST="0.0.0.0") as begun:
        yield begun


@NEEDS_HAPROXY
@pytest.mark.parametrize("part", ["server", "watchdog"])
def test_while_one_of_them_lives_nobody_else_gets_the_port_to_which_keys_are_sent(begun: Running, part: str) -> None:
    """Whatever else has ended, in whatever order: each has inherited the egress door's listening socket."""
    held = {each.laddr for each in begun.named[part].net_connections() if each.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", begun.ports[1]) in held, held


@NEEDS_HAPROXY
@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_nobody_else_becomes_localhost(begun: Running) -> None:
    """`localhost` is ::1 to many clients, which would send their keys there."""
    assert not can_listen("::1", begun.ports[0])


@NEEDS_HAPROXY
def test_behind_a_front_the_server_is_for_this_machine_alone(begun: Running) -> None:
    assert begun.gateway.environ["LLAMA_STACK_HOST"] == "127.0.0.1"
    assert listening(begun.ports[0]) == ["0.0.0.0"]


@NEEDS_HAPROXY
@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_listening_on_every_ipv6_address_serves_ipv4_too(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path, LLAMA_STACK_HOST="::", **BOTH_DOORS)

    def connected() -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", gateway.port)) == 0

    assert gateway.environ_at_start(connected)


@NEEDS_HAPROXY
def test_nobody_else_finds_haproxys_admin_socket(begun: Running) -> None:
    assert not [path for path in begun.gateway.home.rglob("*") if path.is_socket()]


@NEEDS_HAPROXY
def test_the_server_may_open_as_many_files_as_it_can_be_given(begun: Running) -> None:
    """Each connection is one, and the server never closes an idle one."""
    for part in ("server", "start"):
        soft, hard = begun.named[part].rlimit(psutil.RLIMIT_NOFILE)
        assert soft == (65_536 if hard == -1 else min(65_536, hard))


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
    with just_begun(tmp_path, **NOWHERE) as begun:
        response = httpx.post(
            f"{begun.gateway.url}/openai/v1/x", headers={"Authorization": "Bearer sk-fake"}, trust_env=False, timeout=60
        )
        assert response.status_code == 503
        assert "HTTPS_PROXY" in message(response)
