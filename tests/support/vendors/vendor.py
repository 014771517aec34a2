"""What tells one vendor's OpenAI-compatible API from another's."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from .answer import Answer


class Vendor(ABC):
    """A vendor: its name, its paths, and the shape of what it answers.

    `prefixes` are the paths before `/chat/completions`, `bad_key` its status and words for a wrong key.
    """

    name: str
    title: str
    prefixes: tuple[str, ...] = ("/v1",)
    bad_key: tuple[int, str]

    @property
    def key(self) -> str:
        """The key that this stand-in accepts; anything that starts like it will do, so that callers can have their own."""
        return f"sk-fake-{self.name}"

    @abstractmethod
    def error(self, status: int, message: str) -> Any:
        """The body of an error."""

    def check(self, body: dict) -> None:  # noqa: B027
        """Raise `Refused` for a chat call that this vendor refuses."""

    def no_such_model(self, model: str) -> str:
        """Its words for a model that it does not have."""
        return f"The model {model} does not exist."

    @abstractmethod
    def chat(self, answer: Answer) -> dict:
        """A regular answer."""

    @abstractmethod
    def chunks(self, answer: Answer, with_usage: bool) -> Iterator[dict]:
        """A streamed answer, chunk by chunk, without the closing `[DONE]`."""

    def embeddings(self, model: str, data: list[dict]) -> dict:
        """The answer with `data`, a list of embeddings."""
        usage = {"prompt_tokens": len(data), "total_tokens": len(data)}
        return {"object": "list", "data": data, "model": model, "usage": usage}

    def headers(self) -> dict[str, str]:
        """What it tells in headers beside each answer."""
        return {}
