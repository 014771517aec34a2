"""Callers who do something else than ask once: who ask all the time, who stay on a stream, who leave it."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Self

import httpx

from .calls import ALL_KEYS, CHAT, MODELS, caller, chat
from .gateway import Gateway
from .vendors import KEYS

GOOD = chat(MODELS[0], "good call")


class Others:
    """Another caller, who asks all the time. A context manager; afterwards `waited` has the seconds of each of its calls.

    Raises AssertionError at the end if one of its calls was not answered well.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.waited: list[float] = []
        self.problems: list[str] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.ask)

    def ask(self) -> None:
        """Call until the context ends, at least once."""
        with caller(self.gateway.url, timeout=60) as client:
            while True:
                start = time.monotonic()
                try:
                    response = client.post(CHAT, headers=ALL_KEYS, json=GOOD)
                    if not response.is_success:
                        self.problems.append(f"{response.status_code} {response.text}")
                except httpx.HTTPError as error:
                    self.problems.append(repr(error))
                self.waited.append(time.monotonic() - start)
                if self.done.wait(0.05):
                    return

    @property
    def worst(self) -> float:
        """The longest that one of the calls took, in seconds."""
        return max(self.waited)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        assert self.problems == []


class Stream(threading.Thread):
    """A caller of a stream, of which the first line has come. `problem` is why it broke off, if it did."""

    def __init__(
        self, gateway: Gateway, model: str, prompt: str, path: str = CHAT, headers: Mapping[str, str] = MappingProxyType(ALL_KEYS)
    ) -> None:
        super().__init__(daemon=True)
        self.url, self.path, self.headers, self.body = gateway.url, path, dict(headers), chat(model, prompt, stream=True)
        self.started = threading.Event()
        self.lines: list[str] = []
        self.problem: httpx.HTTPError | None = None
        self.start()
        assert self.started.wait(60), f"No line of the stream came: {self.problem}"

    def run(self) -> None:
        """Read to the end."""
        try:
            with (
                caller(self.url, timeout=60) as client,
                client.stream("POST", self.path, headers=self.headers, json=self.body) as response,
            ):
                for line in response.iter_lines():
                    self.lines.append(line)
                    self.started.set()
        except httpx.HTTPError as error:
            self.problem = error

    @property
    def finished(self) -> bool:
        """Whether the answer says that it is complete."""
        return any('"finish_reason":"stop"' in line.replace(": ", ":") for line in self.lines)


@contextlib.contextmanager
def open_stream(gateway: Gateway, model: str, prompt: str = "Hello") -> Iterator[None]:
    """A stream of which the first line has come, and whose caller stays, but leaves at the end of the context."""
    with (
        caller(gateway.url, timeout=60) as client,
        client.stream("POST", CHAT, headers=ALL_KEYS, json=chat(model, prompt, stream=True)) as response,
    ):
        lines = response.iter_lines()  # Kept, because httpx hangs up when it is dropped.
        next(lines)
        yield


def assert_clean(gateway: Gateway) -> None:
    """No key, prompt or traceback is in the log."""
    log = gateway.log
    assert not [word for word in (*KEYS.values(), "Traceback", "good call", "secret prompt") if word in log]
