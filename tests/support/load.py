"""Callers that keep a gateway busy while a test does something to it."""

import asyncio
import re
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Self

import httpx

from .calls import ALL_KEYS
from .gateway import eventually


class Call(NamedTuple):
    """One call of the load: its body, when it began and ended on `time.monotonic`, and what was wrong with its answer."""

    body: dict
    began: float
    ended: float
    wrong: str | None

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


class Load:
    """Chat calls to `url` until the context ends. `callers` callers for each of `bodies` make one call after the other.

    An answer is whole if it has a finish_reason; `lost` are the calls whose answer was not.
    """

    def __init__(self, url: str, bodies: Sequence[dict], callers: int = 1, headers: dict[str, str] = ALL_KEYS) -> None:
        self.url, self.bodies, self.callers, self.headers = url, bodies, callers, headers
        self.calls: list[Call] = []
        self.ending = threading.Event()

    async def call(self, client: httpx.AsyncClient, body: dict) -> None:
        """Make one call and write down how it went."""
        began, wrong = time.monotonic(), None
        try:
            response = await client.post("/v1/chat/completions", headers=self.headers, json=body)
            if not response.is_success or not re.search(r'"finish_reason": ?"stop"', response.text):
                wrong = f"{response.status_code} {response.text[-200:]}"
        except httpx.HTTPError as error:
            wrong = repr(error)
        self.calls.append(Call(body, began, time.monotonic(), wrong))

    async def run(self) -> None:
        """Keep every caller busy until the context ends."""

        async def caller(body: dict) -> None:
            while not self.ending.is_set():
                await self.call(client, body)
                await asyncio.sleep(0.05)

        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False) as client:
            await asyncio.gather(*(caller(body) for body in self.bodies for _ in range(self.callers)))

    def wait_for_calls(self, count: int = 1, seconds: float = 60) -> None:
        """Return when, for each body, `count` calls that begin from now on have ended."""
        start = time.monotonic()

        def ended(body: dict) -> int:
            return sum(call.began > start for call in list(self.calls) if call.body is body)

        assert eventually(lambda: all(ended(body) >= count for body in self.bodies), seconds), f"{self} in {seconds} s"

    @property
    def lost(self) -> list[Call]:
        return [call for call in self.calls if call.wrong]

    def __str__(self) -> str:
        streams = sum(call.stream for call in self.calls)
        return f"{len(self.calls) - streams} regular and {streams} streamed calls, {len(self.lost)} lost"

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=asyncio.run, args=(self.run(),), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join(70)
