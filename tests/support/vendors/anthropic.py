"""Claude's shape on its OpenAI-compatible endpoint: https://platform.claude.com/docs/en/api/openai-sdk, and what it answers."""

from collections.abc import Iterator
from typing import Any

from .answer import CREATED, Answer, new_id
from .vendor import Vendor

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 529: "overloaded_error"}

# Claude often says something before it calls a tool.
BESIDE = "Let me look that up."


class Anthropic(Vendor):
    """api.anthropic.com."""

    name, title = "anthropic", "Anthropic"
    bad_key = (401, "invalid x-api-key")

    def error(self, status: int, message: str) -> dict:
        """OpenAI's shape, with Anthropic's own types."""
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"error": {"code": kind, "message": message, "type": kind, "param": None}}

    def no_such_model(self, model: str) -> str:
        return f"model: {model}"

    def headers(self) -> dict[str, str]:
        return {"request-id": "req_fake", "anthropic-ratelimit-requests-remaining": "59"}

    @staticmethod
    def head(answer: Answer, kind: str) -> dict:
        return {"id": new_id("msg_"), "object": kind, "created": CREATED, "model": answer.model}

    def chat(self, answer: Answer) -> dict:
        message: dict[str, Any] = {"role": "assistant", "content": BESIDE if answer.calls else answer.text}
        if answer.calls:
            message["tool_calls"] = answer.calls
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        return self.head(answer, "chat.completion") | {"choices": [choice], "usage": answer.usage}

    def chunks(self, answer: Answer, with_usage: bool) -> Iterator[dict]:
        head = self.head(answer, "chat.completion.chunk")

        def chunk(delta: dict, finish: str | None = None) -> dict:
            return head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

        yield chunk({"role": "assistant", "content": ""})
        for word in [BESIDE] if answer.calls else answer.words:
            yield chunk({"content": word})
        for i, call in enumerate(answer.calls):
            function = call["function"]
            yield chunk({"tool_calls": [{"index": i} | call | {"function": function | {"arguments": ""}}]})
            for piece in function["arguments"].partition(" "):
                yield chunk({"tool_calls": [{"index": i, "function": {"arguments": piece}}]})
        yield chunk({}, answer.finish)
        if with_usage:
            yield head | {"choices": [], "usage": answer.usage}
