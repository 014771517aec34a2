"""Both ends of a call: what a client library sent, and what arrived at the vendor."""

import json
from typing import Any

import httpx

from .calls import CONNECTIONS
from .vendors import Vendors


def without_nulls(value: Any) -> Any:
    """A body without the parameters, and the fields of messages, that are null: the server leaves those out."""
    if isinstance(value, dict):
        return {name: without_nulls(item) if name == "messages" else item for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class BothEnds:
    """HTTP clients for a library to use, which note what it sends, and the vendors that note what arrives."""

    def __init__(self, vendors: Vendors) -> None:
        self.vendors = vendors
        self.requests: list[httpx.Request] = []
        self.settings = CONNECTIONS | {"timeout": 30}
        self.client = httpx.Client(event_hooks={"request": [self.requests.append]}, **self.settings)

    def async_client(self) -> httpx.AsyncClient:
        """A client for one event loop."""

        async def note(request: httpx.Request) -> None:
            self.requests.append(request)

        return httpx.AsyncClient(event_hooks={"request": [note]}, **self.settings)

    @property
    def sent(self) -> dict:
        """The body of the last call that the library made."""
        return json.loads(self.requests[-1].content)

    @property
    def arrived(self) -> dict:
        """The body of the last call that a vendor got."""
        return self.vendors.seen[-1].json

    def assert_unchanged(self) -> None:
        """The vendor got exactly what the library sent, with its own name for the model."""
        assert self.arrived == without_nulls(self.sent) | {"model": self.sent["model"].partition("/")[2]}
