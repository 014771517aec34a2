"""deploy/lls-openai.service: what it promises, as systemd's own checker sees it. This asks no running systemd."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.gateway import PROJECT, clean_environ

UNIT = PROJECT / "deploy/lls-openai.service"
HOME = "/opt/lls-openai"

# Where the service is not closed off, and why not.
OPEN = {
    "DeviceAllow": "ProtectClock lets it read the clock's device, which PrivateDevices then hides",
    "IPAddressDeny": "vendors have names, and their addresses change",
    "MemoryDenyWriteExecute": "HAProxy compiles patterns",
    "PrivateMounts": "it has a view of its own all the same, which ProtectHome and others need",
    "PrivateNetwork": "it is a network service",
    "ProcSubset": "deploy/serve.sh looks in /proc/net for a rival on its port",
    "RestrictAddressFamilies_AF_INET_INET6": "it is a network service",
    "RestrictAddressFamilies_AF_NETLINK": "libc asks whether there is IPv6",
    "RestrictAddressFamilies_AF_UNIX": "libc asks for names, and workers talk to one another",
    "RootDirectoryOrRootImage": "it uses the system's shell, libraries and HAProxy",
    "SystemCallFilter_privileged": "part of @system-service",
    "SystemCallFilter_resources": "deploy/serve.sh raises the limit of descriptors",
}


def setting(name: str) -> str:
    """The one value of a setting, without %t, which is /run."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
    return value.replace("%t", "/run")


def environment() -> dict[str, str]:
    """The variables that the unit sets."""
    lines = re.findall(r"^Environment=(.*)$", UNIT.read_text(), flags=re.MULTILINE)
    return dict(item.replace("%t", "/run").split("=", 1) for line in lines for item in line.split())


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
    assert {check["json_field"] for check in json.loads(done.stdout) if check["set"] is False} - set(OPEN) == set()


def test_what_is_written_ends_with_the_service() -> None:
    """In a folder below /run that systemd makes, closes to others, and removes."""
    assert environment()["SQLITE_STORE_DIR"] == f"/run/{setting('RuntimeDirectory')}"
    assert setting("RuntimeDirectoryMode") == "0700"
    assert "RuntimeDirectoryPreserve" not in UNIT.read_text()
    assert "StateDirectory" not in UNIT.read_text()


def test_streams_in_flight_finish() -> None:
    """SIGTERM goes to deploy/serve.sh alone, and 600 s are what the stock provider gives a vendor."""
    assert setting("KillMode") == "mixed"
    assert int(setting("TimeoutStopSec")) > 600


def test_it_is_started_again_unless_a_setting_is_wrong(tmp_path: Path) -> None:
    """By default systemd gives up after five starts in ten seconds."""
    assert setting("Restart") == "on-failure"
    assert int(setting("RestartSec")) * 5 > 10
    half = clean_environ(tmp_path, LLAMA_STACK_TLS_CERTFILE="/nowhere", EGRESS="0")
    command = [setting("ExecStart").replace(HOME, str(PROJECT))]
    done = subprocess.run(command, env=half, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == int(setting("RestartPreventExitStatus")), done.stderr


def test_a_call_that_the_filter_refuses_does_not_kill_the_server() -> None:
    assert setting("SystemCallErrorNumber") == "EPERM"


def test_it_has_limits() -> None:
    assert int(setting("LimitNOFILE")) >= 65536
    assert setting("MemoryMax") == "1G"


def test_its_programs_and_settings_are_found() -> None:
    """The project's Python first, HAProxy where Debian keeps it, and a file of settings that may be missing."""
    path = environment()["PATH"].split(os.pathsep)
    assert path[0] == f"{HOME}/.venv/bin"
    assert "/usr/sbin" in path
    assert setting("EnvironmentFile") == "-/etc/lls-openai.env"
    order = [UNIT.read_text().rindex(f"\n{name}=") for name in ("Environment", "EnvironmentFile", "ExecStart")]
    assert order == sorted(order)


def test_it_starts_with_the_machine_and_when_there_is_a_network() -> None:
    assert setting("WantedBy") == "multi-user.target"
    assert setting("After") == setting("Wants") == "network-online.target"


def test_the_way_to_install_it_names_what_is_there() -> None:
    says = "\n".join(line for line in UNIT.read_text().splitlines() if line.startswith("#   "))
    assert f"cp {HOME}/{UNIT.relative_to(PROJECT)} /etc/systemd/system/" in says
    assert ".uv/bin/uv:" in (PROJECT / "Makefile").read_text()
    assert f"UV_PYTHON_INSTALL_DIR={HOME}/" in says
