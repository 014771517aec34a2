"""What a fresh install brings. These need a package registry, as installing does."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.gateway import PROJECT, START, Gateway

from . import Bench, Row, Skipped, ask, patient


def install(bench: Bench, leave_out: str) -> Path:
    """Resolve and install the project's packages afresh, without the line of pyproject.toml that has `leave_out` in it.

    Returns the environment's folder. Raises Skipped if uv does not succeed.
    """
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    # As users have it, without the development groups, whose packages have bounds of their own.
    text = re.sub(
        r"^\[dependency-groups\]\n.*?(?=^\[tool)", "", (PROJECT / "pyproject.toml").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    lines = text.splitlines(keepends=True)
    (folder / "pyproject.toml").write_text("".join(line for line in lines if not leave_out or leave_out not in line))
    uv = os.environ.get("UV") or shutil.which("uv") or str(PROJECT / ".uv/bin/uv")
    outside = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    command = [uv, "sync", "--quiet", "--no-dev", "--python", sys.executable]
    if subprocess.run(command, cwd=folder, env=outside, check=False, capture_output=True).returncode:
        raise Skipped("The packages could not be installed: is there a package registry to be reached?")
    return folder / ".venv"


def version(environment: Path, package: str) -> str:
    """The version of a package in an environment."""
    (folder,) = environment.glob(f"lib/python*/site-packages/{package}-*.dist-info")
    return folder.name.removesuffix(".dist-info").partition("-")[2]


def of(bench: Bench, environment: Path) -> Gateway:
    """A gateway, not yet started, with the packages in `environment`."""
    return bench.gateway(command=(str(environment / "bin/python"), *START[1:]))


def first_call(bench: Bench, environment: Path) -> str:
    """What comes of starting the gateway with the packages in `environment`, and of a call."""
    gateway = of(bench, environment)
    try:
        with gateway, patient(gateway) as client:
            return f"a call answers {ask(client).status_code}"
    except RuntimeError:
        errors = re.findall(r"^(?:\w+\.)*\w*Error: .*", gateway.log, re.MULTILINE)
        return f"no start: {errors[-1].split(' (')[0] if errors else gateway.log.splitlines()[-1]}"


def constraint(bench: Bench, package: str, trap: str) -> Row:
    """Without the constraint on a package, with the newest of everything, beside the same with it."""
    without, within = install(bench, f'"{package}<'), install(bench, "")
    return Row(
        f"the constraint on `{package}`",
        trap,
        f"{package} {version(without, package)}: {first_call(bench, without)}",
        f"{package} {version(within, package)}: {first_call(bench, within)}",
    )


def newest_mcp(bench: Bench) -> Row:
    """mcp 2 and later."""
    return constraint(bench, "mcp", "a fresh install does not start")


def newest_openai(bench: Bench) -> Row:
    """openai 2.34 and later."""
    return constraint(bench, "openai", "every call of a fresh install fails")


def unused_packages(bench: Bench) -> Row:
    """What the packages weigh that are left out."""

    def size(environment: Path) -> str:
        return f"{sum(path.lstat().st_blocks * 512 for path in environment.rglob('*')) / 1e6:.0f} MB"

    return Row(
        "the overrides in `pyproject.toml`",
        "packages are installed that nothing here uses",
        size(install(bench, "python_version < '0'")),
        size(install(bench, "")),
    )


def endless_headers(bench: Bench) -> Row:
    """One connection that sends header lines until it is cut off, 100 MB at most."""
    most, line = 100_000_000, b"X-Header: " + b"x" * 10_000 + b"\r\n"

    def measure(gateway: Gateway) -> str:
        with gateway, socket.create_connection(("127.0.0.1", gateway.port), 60) as connection:
            before, sent = gateway.resident(), 0
            connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n")
            try:
                while sent < most:
                    connection.sendall(line)
                    sent += len(line)
            except OSError:
                pass
            time.sleep(1)
            grown = max(0, gateway.resident() - before) / 1e6
        return f"{'goes on after' if sent >= most else 'cut off within'} {sent / 1e6:.0f} MB, {grown:.0f} MB more memory"

    return Row(
        "h11 instead of httptools",
        "headers without end fill the memory, on one connection and without a key",
        measure(of(bench, install(bench, "httptools;"))),
        measure(bench.gateway()),
    )
