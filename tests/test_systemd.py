"""deploy/lls-openai.service: its command, run as written, and how far it is closed off. This asks no running systemd."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat
from support.gateway import HAPROXY, PROJECT, Gateway, clean_environ
from support.vendors import Vendors

UNIT = PROJECT / "deploy/lls-openai.service"
HOME = "/opt/lls-openai"

# Where the service is not closed off, and why not.
OPEN = {
    "DeviceAllow": "ProtectClock lets it read the clock's device, which PrivateDevices then hides",
    "IPAddressDeny": "vendors have names, and their addresses change",
    "MemoryDenyWriteExecute": "HAProxy compiles patterns",
    "PrivateMounts": "it has a view of its own all the same, which ProtectHome and others need",
    "PrivateNetwork": "it is a network service",
    "RestrictAddressFamilies_AF_INET_INET6": "it is a network service",
    "RestrictAddressFamilies_AF_NETLINK": "libc asks whether there is IPv6",
    "RestrictAddressFamilies_AF_UNIX": "libc asks for names, workers talk to one another, and the start to HAProxy",
    "RootDirectoryOrRootImage": "it uses the system's shell, libraries and HAProxy",
    "SystemCallFilter_privileged": "part of @system-service",
    "SystemCallFilter_resources": "the start and HAProxy raise the limit of descriptors",
}


def setting(name: str) -> str:
    """The one value of a setting, with this project in the place of the one in /opt."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
    return value.replace(HOME, str(PROJECT))


def environment(run: Path) -> dict[str, str]:
    """The variables that the unit sets, where `run` is what it calls %t, and systemd's own search path."""
    items = setting("Environment").replace("%t", str(run)).split()
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
    return dict(item.split("=", 1) for item in items) | {"PATH": path}


def analyze(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze on the unit, which finds this project where it looks for the one in /opt."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd is not installed")
    unit = folder / UNIT.name
    unit.write_text(UNIT.read_text().replace(HOME, str(PROJECT)))
    return subprocess.run(["systemd-analyze", *command, str(unit)], capture_output=True, text=True, timeout=60, check=False)


def test_the_unit_is_valid(tmp_path: Path) -> None:
    """Not a word of warning, and there is a command to run."""
    done = analyze(tmp_path, "verify")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_service_is_closed_off_but_where_it_has_a_reason(tmp_path: Path) -> None:
    done = analyze(tmp_path, "security", "--offline=true", "--json=short")
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd is older than 250, and asks a running one")
    assert done.returncode == 0, done.stderr
    unset = {check["json_field"] for check in json.loads(done.stdout) if check["set"] is False}
    assert unset - set(OPEN) == set(), "set it in the unit, or say in OPEN why not"
    assert set(OPEN) - unset == set(), "this is closed by now: take it out of OPEN"


def test_its_command_starts_a_gateway_that_writes_below_run_alone(tmp_path: Path, vendors: Vendors) -> None:
    """In the folder and with the search path that systemd gives a service."""
    run = tmp_path / "run"
    (run / setting("RuntimeDirectory")).mkdir(parents=True, mode=int(setting("RuntimeDirectoryMode"), 8))
    command = tuple(setting("ExecStart").split())
    # A home of the test's is left empty, because the unit has another.
    gateway = Gateway(tmp_path / "home", command, Path("/"), **environment(run), **vendors.environ())
    with gateway, caller(gateway.url) as client:
        assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0])).is_success
        if HAPROXY:
            assert client.get("/").headers["content-type"].startswith("text/html"), "HAProxy was not found"
    assert {path.relative_to(run).parts[0] for path in run.rglob("*")} == {setting("RuntimeDirectory")}
    assert list((tmp_path / "home").iterdir()) == [gateway.log_file]


def test_streams_in_flight_finish() -> None:
    """systemd tells the start alone to stop, and waits longer than the 600 s that the stock provider gives a vendor."""
    assert setting("KillMode") == "mixed"
    assert int(setting("TimeoutStopSec")) > 600


def test_it_has_the_memory_of_a_pod_and_the_files_that_the_start_asks_for() -> None:
    pods = (PROJECT / "deploy/kubernetes/deployment.yaml").read_text()
    assert int(setting("MemoryMax").removesuffix("G")) << 10 >= int(re.findall(r"memory: (\d+)Mi", pods)[-1])
    assert f"min({int(setting('LimitNOFILE')):_}, most)" in (PROJECT / "deploy/start/__main__.py").read_text()


def test_it_is_started_again_unless_a_setting_is_wrong(tmp_path: Path) -> None:
    """By default systemd gives up after five starts in ten seconds."""
    assert setting("Restart") == "on-failure"
    assert int(setting("RestartSec")) * 5 > 10
    half = clean_environ(tmp_path, LLAMA_STACK_TLS_CERTFILE="/nowhere", **environment(tmp_path))
    done = subprocess.run(setting("ExecStart").split(), env=half, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == int(setting("RestartPreventExitStatus")), done.stderr


def test_settings_of_the_file_win_over_the_units() -> None:
    """Of two values systemd takes the later one, and the file may be missing."""
    order = [UNIT.read_text().rindex(f"\n{name}=") for name in ("Environment", "EnvironmentFile", "ExecStart")]
    assert order == sorted(order)
    assert setting("EnvironmentFile") == "-/etc/lls-openai.env"
