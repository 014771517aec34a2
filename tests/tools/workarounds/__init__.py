"""What this project does about the stock server, undone one thing at a time: `make workarounds` (see `__main__.py`).

Each trap is a function that starts the real server on a copy of the project with one thing changed, measures it, measures the
same on the shipped files, and returns its row of the table that ends up in tests/tools/workarounds/results.md.
"""

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from support.calls import ALL_KEYS, MODELS, caller, chat
from support.gateway import START, Gateway, copy_project
from support.vendors import Vendors

PROMPT = "word " * 800  # 4 KB

# In every environment, undone or not: what a server's own environment might hold.
OF_THE_SERVER = {
    "OPENAI_API_KEY": "sk-fake-server",
    "OPENAI_ORG_ID": "org-of-the-server",
    "OPENAI_PROJECT_ID": "project-of-the-server",
}


# The stock server alone, as it is without HAProxy.
NO_DOORS = {"FRONT": "0", "EGRESS": "0"}


class Skipped(Exception):
    """A trap that cannot be measured on this machine. The message is a sentence that says why."""


class Row(NamedTuple):
    """One trap: what the configuration does about it, what happens without, and both measurements, as table cells."""

    does: str
    trap: str
    without: str
    measured: str


class Edit(NamedTuple):
    """One thing undone: `old` in the file `name` of the project becomes `new`."""

    name: str
    old: str
    new: str


class Bench:
    """The stand-in vendors, a folder for everything, and the gateway as it ships, started once for all."""

    def __init__(self, vendors: Vendors, folder: Path) -> None:
        self.vendors, self.folder = vendors, folder
        self.shipped = Gateway(folder / "shipped", START, **vendors.environ(), **OF_THE_SERVER, **NO_DOORS)

    def project(self, *edits: Edit) -> Path:
        """A copy of the files that a server needs, with `edits` made. Raises ValueError if there is nothing to undo."""
        copy = copy_project(Path(tempfile.mkdtemp(dir=self.folder)) / "project")
        for name, old, new in edits:
            text = (copy / name).read_text()
            if old not in text:
                raise ValueError(f"{name} no longer has what this undoes: {old}")
            (copy / name).write_text(text.replace(old, new))
        return copy

    def gateway(self, *edits: Edit, command: tuple[str, ...] = START, **settings: str) -> Gateway:
        """A gateway, not yet started, of the project with `edits` made and `settings` in its environment."""
        copy = self.project(*edits)
        return Gateway(copy.parent / "home", command, copy, **self.vendors.environ() | OF_THE_SERVER | NO_DOORS | settings)

    def compare(self, does: str, trap: str, measure: Callable[[Gateway], str], *edits: Edit, **settings: str) -> Row:
        """The row of a trap that `measure` shows on a running gateway: with `edits` made, and as it ships."""
        with self.gateway(*edits, **settings) as gateway:
            without = measure(gateway)
        return Row(does, trap, without, measure(self.shipped))


def patient(gateway: Gateway, **settings: Any) -> httpx.Client:
    """A caller who also waits for a server that is busy printing tracebacks."""
    return caller(gateway.url, timeout=300, **settings)


def ask(client: httpx.Client, model: str = MODELS[0], header: dict[str, str] = ALL_KEYS, prompt: str = "Hello") -> httpx.Response:
    """One regular chat call."""
    return client.post("/v1/chat/completions", headers=header, json=chat(model, prompt))


def ask_many(gateway: Gateway, count: int, callers: int = 1, prompt: str = PROMPT) -> int:
    """Make `count` chat calls from `callers` callers at a time. Returns how many failed."""
    with patient(gateway) as client, ThreadPoolExecutor(callers) as pool:
        return sum(not answer.is_success for answer in pool.map(lambda _: ask(client, prompt=prompt), range(count)))
