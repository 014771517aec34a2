"""What people run: a gateway with all doors, vendors that answer at every path, and programs in folders of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from starlette.responses import Response

from .gateway import PROJECT, clean_environ
from .native_vendors import generated, messages, response
from .network import NameServer
from .vendors import KEYS, Refused, Scripted, Vendor, Vendors

FOLDER = PROJECT / "tests" / "programs"

# The list form of all keys, where a program has room for an API key alone.
LIST = ";".join(f"{name}={key}" for name, key in KEYS.items())


class EveryPath(Vendors):
    """Stand-ins that answer at the vendors' own paths too, with the key in the header that is the vendor's own."""

    async def answer_call(self, vendor: Vendor, path: str, key: str, body: bytes) -> Response:
        headers = self.seen[-1].headers
        key = key or f"Bearer {headers.get('x-api-key') or headers.get('x-goog-api-key', '')}"
        native = {"openai": response, "anthropic": messages, "gemini": generated}[vendor.name]
        if not re.search(r"/responses$|/messages$|enerateContent$", path):
            return await super().answer_call(vendor, path, key, body)
        if not key.startswith(f"Bearer {vendor.key}"):
            status, message = vendor.bad_key
            raise Refused(status, vendor.error(status, message))
        stream = json.loads(body).get("stream") or "streamGenerateContent" in path
        return Scripted(200, {"content-type": "text/event-stream" if stream else "application/json"}, native(stream)).response()

    def settings(self, names: NameServer) -> dict[str, str]:
        """What leads the egress door to the stand-ins."""
        return {
            "EGRESS_CA": str(self.ca_file),
            "EGRESS_NAMESERVER": f"127.0.0.1:{names.port}",
            "EGRESS_VENDOR_PORT": str(self.tls_port),
        }


@dataclass
class Program:
    """A program as a list in tests/programs tells of it.

    `packages` are installed from the registry `of` into a folder. Then `files` are written, by their paths, and `run` is run, with
    `environ`. In all of them stand {url} for the gateway and {keys} for the list of keys. `says` is in what it prints, once for
    each answer, and `arrives` are the vendors' paths that it has called.
    """

    name: str
    of: str
    packages: list[str]
    run: str
    says: list[str]
    arrives: list[str]
    files: dict[str, str] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)

    def install(self, folder: Path) -> str:
        """Install it into `folder`. Returns its version, or raises RuntimeError with a reason why that cannot be."""
        if self.of == "npm":
            if not shutil.which("npm"):
                raise RuntimeError("npm is not installed")
            command = [*"npm install --no-audit --no-fund --no-update-notifier --prefix".split(), str(folder), *self.packages]
        else:
            uv = os.environ.get("UV") or shutil.which("uv")
            if not uv:
                raise RuntimeError("uv is not installed")
            subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
            command = [uv, "pip", "install", "--quiet", "--python", str(folder / "venv"), *self.packages]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"it cannot be installed: {' '.join(done.stderr.split())[:300]}")
        return self.version(folder)

    def version(self, folder: Path) -> str:
        """The version that was installed."""
        package = re.split(r"[\[=<>]", self.packages[0])[0] if self.of != "npm" else self.packages[0]
        if self.of == "npm":
            return json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
        ask = f"from importlib.metadata import version; print(version({package!r}))"
        return subprocess.run([folder / "venv/bin/python", "-c", ask], capture_output=True, text=True, check=True).stdout.strip()

    def start(self, folder: Path, url: str) -> subprocess.CompletedProcess:
        """Run it against the gateway at `url`, in an environment and a home of its own."""
        work = folder / "work"
        for name, text in self.files.items():
            file = work / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.filled(text, url))
        work.mkdir(exist_ok=True)
        environ = clean_environ(work, **{name: self.filled(value, url) for name, value in self.environ.items()})
        environ["PATH"] = f"{folder}/venv/bin:{folder}/node_modules/.bin:{environ['PATH']}"
        return subprocess.run(
            ["sh", "-ec", self.filled(self.run, url)],
            cwd=work,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    @staticmethod
    def filled(text: str, url: str) -> str:
        """A text with what the gateway's address and the keys are."""
        return text.replace("{url}", url).replace("{keys}", LIST)


def programs() -> list[Program]:
    """All programs that are run."""
    return [Program(**each) for each in yaml.safe_load((FOLDER / "programs.yaml").read_text())]
