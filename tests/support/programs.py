"""What people run: a gateway with all doors, vendors that answer at every path, and programs in folders of their own."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml
from starlette.responses import Response

from .gateway import PROJECT, clean_environ
from .native_vendors import event, generated, messages, response
from .network import NameServer
from .vendors import KEYS, Refused, Scripted, Vendor, Vendors

FOLDER = PROJECT / "tests" / "programs"
PAGE = (PROJECT / "docs" / "programs.md").read_text()


def responses(streamed: bool) -> list[bytes]:
    """OpenAI's Responses, with each event that a program may wait for. Source: platform.openai.com/docs/api-reference/responses."""
    if not streamed:
        return response(False)
    whole = json.loads(response(False)[0])
    _, item = whole["output"]
    part, at = item["content"][0], {"item_id": item["id"], "output_index": 0, "content_index": 0}
    empty = part | {"text": ""}
    begun = {"status": "in_progress", "output": []}
    usage = {"input_tokens": 1, "output_tokens": 3, "total_tokens": 4}
    usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    steps = [
        {"type": "response.created", "response": whole | begun},
        {"type": "response.output_item.added", "output_index": 0, "item": item | {"status": "in_progress", "content": []}},
        {"type": "response.content_part.added", "part": empty} | at,
        *({"type": "response.output_text.delta", "delta": word, "logprobs": []} | at for word in ("Hello", " from", " OpenAI")),
        {"type": "response.output_text.done", "text": part["text"], "logprobs": []} | at,
        {"type": "response.content_part.done", "part": part} | at,
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": whole | {"output": [item], "usage": usage}},
    ]
    return [event(step | {"sequence_number": i}, str(step["type"])) for i, step in enumerate(steps)]


class EveryPath(Vendors):
    """Stand-ins that answer at the vendors' own paths too, with the key in the header that is the vendor's own."""

    async def answer_call(self, vendor: Vendor, path: str, key: str, body: bytes) -> Response:
        headers = self.seen[-1].headers
        key = key or f"Bearer {headers.get('x-api-key') or headers.get('x-goog-api-key', '')}"
        native = {"openai": responses, "anthropic": messages, "gemini": generated}[vendor.name]
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


# What the page has in the place of keys. The longest first, because the others are in it.
PLACES = {"sk-ant-…": KEYS["anthropic"], "AI…": KEYS["gemini"], "sk-…": KEYS["openai"]}

# A block of the page: the line before it, its language and its text.
BLOCK = r"([^\n]*)\n\n```(\w+)\n(.*?)^```$"

# By the language of a block: the file that it is, where the page names none, and how that is run.
SCRIPTS = {"python": ("program.py", "python program.py"), "js": ("program.mjs", "node program.mjs")}


@dataclass
class Program:
    """A program that is run as its section of the page says: files are written, and what stands under `sh` is typed.

    `packages` are installed from the registry `of`. `says` is in what it prints of an answer, and `calls` is whom it calls: a vendor
    and the path there. `environ` keeps it quiet, and `.` in it is the folder in which it runs.
    """

    name: str
    of: str
    packages: list[str]
    says: str
    calls: str
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def section(self) -> str:
        """What the page says of it."""
        return PAGE.partition(f"\n## {self.name}\n")[2].partition("\n## ")[0]

    def install(self, folder: Path) -> str:
        """Install it into `folder`. Returns its version, or raises RuntimeError with the reason why that cannot be."""
        if self.of == "npm":
            npm = shutil.which("npm")
            command = [npm, *["install", "--no-audit", "--no-fund", "--no-update-notifier", "--prefix"], folder, *self.packages]
        else:
            npm = os.environ.get("UV") or shutil.which("uv")
            command = [npm, "pip", "install", "--quiet", "--python", folder / "venv", *self.packages]
        if not npm:
            raise RuntimeError("npm is not installed" if self.of == "npm" else "uv is not installed")
        if self.of == "pypi":
            subprocess.run([npm, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(f"it cannot be installed: {' '.join(done.stderr.split())[:300]}")
        package = self.packages[0].partition("[")[0]
        if self.of == "npm":
            return json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
        ask = f"from importlib.metadata import version; print(version({package!r}))"
        return subprocess.run([folder / "venv/bin/python", "-c", ask], capture_output=True, text=True, check=True).stdout.strip()

    def run(self, folder: Path, url: str) -> str:
        """What it prints against the gateway at `url`, in an environment and a home of its own."""
        typed, script = [], ""
        for before, language, text in re.findall(BLOCK, f"\n{self.section}", re.MULTILINE | re.DOTALL):
            for place, key in PLACES.items():
                text = text.replace(place, key)
            text = text.replace("http://127.0.0.1:8321", url)
            if language == "sh":
                typed.append(text)
                continue
            named = re.findall(r"`((?:~/)?[\w./-]+\.\w+)`", before)
            name, script = SCRIPTS.get(language, ("", "")) if not named else (named[0].removeprefix("~/"), "")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        quiet = {name: str(folder) if value == "." else value for name, value in self.environ.items()}
        environ = clean_environ(folder, **quiet)
        environ["PATH"] = f"{folder}/venv/bin:{folder}/node_modules/.bin:{environ['PATH']}"
        with (folder / "printed").open("w+") as printed:
            command = ["sh", "-ec", "\n".join(typed) or script]
            settings = {"cwd": folder, "env": environ, "stdin": subprocess.DEVNULL, "stdout": printed, "stderr": printed}
            with subprocess.Popen(command, start_new_session=True, **settings) as process:
                try:
                    process.wait(180)
                except subprocess.TimeoutExpired:
                    printed.write("It had not ended after three minutes.")
                finally:
                    leave_nothing(folder)
            printed.seek(0)
            return printed.read()


def leave_nothing(folder: Path) -> None:
    """Kill what runs in `folder`: some programs leave a process behind that the next call would find."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                process.kill()


def programs() -> list[Program]:
    """All programs that are run."""
    return [Program(**each) for each in yaml.safe_load((FOLDER / "programs.yaml").read_text())]


def versions() -> dict[str, str]:
    """The version of each program that has last answered to `make programs`."""
    return json.loads((FOLDER / "versions.json").read_text())
