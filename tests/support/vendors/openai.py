"""OpenAI's shape: https://platform.openai.com/docs/api-reference/chat, and what its answers really hold."""

from collections.abc import Iterator

from .answer import CREATED, Answer, Refused, new_id
from .vendor import Vendor

# An answer has the dated name of the model that was asked by its short one.
DATED = {"gpt-4o": "gpt-4o-2024-08-06", "gpt-4o-mini": "gpt-4o-mini-2024-07-18", "gpt-4.1-nano": "gpt-4.1-nano-2025-04-14"}
TYPES = {401: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
REPORTED = {
    "x-request-id": "req_fake",
    "openai-processing-ms": "12",
    "openai-version": "2020-10-01",
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-reset-requests": "1s",
}


class OpenAI(Vendor):
    """api.openai.com."""

    name, title = "openai", "OpenAI"
    bad_key = (401, "Incorrect API key provided. You can find your API key at https://platform.openai.com/account/api-keys.")

    def error(self, status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
        """Source: platform.openai.com/docs/guides/error-codes."""
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}

    def check(self, body: dict) -> None:
        """Reasoning models refuse what the others take."""
        if body["model"].startswith(("o1", "o3", "o4")) and "parallel_tool_calls" in body:
            name = "parallel_tool_calls"
            words = f"Unsupported parameter: '{name}' is not supported with this model."
            raise Refused(400, self.error(400, words, name, "unsupported_parameter"))

    def no_such_model(self, model: str) -> str:
        return f"The model `{model}` does not exist or you do not have access to it."

    def headers(self) -> dict[str, str]:
        return REPORTED

    @staticmethod
    def usage(answer: Answer) -> dict:
        """Counts, with their details."""
        return answer.usage | {
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    @staticmethod
    def head(answer: Answer, kind: str) -> dict:
        return {
            "id": new_id("chatcmpl-"),
            "object": kind,
            "created": CREATED,
            "model": DATED.get(answer.model, answer.model),
            "service_tier": "default",
            "system_fingerprint": "fp_fake",
        }

    def chat(self, answer: Answer) -> dict:
        text = None if answer.calls or answer.refusal else answer.text
        message = {"role": "assistant", "content": text, "refusal": answer.refusal, "annotations": []}
        if answer.calls:
            message["tool_calls"] = answer.calls
        choice = {"index": 0, "message": message, "logprobs": answer.logprobs, "finish_reason": answer.finish}
        return self.head(answer, "chat.completion") | {"choices": [choice], "usage": self.usage(answer)}

    def chunks(self, answer: Answer, with_usage: bool) -> Iterator[dict]:
        head = self.head(answer, "chat.completion.chunk")
        more = {"usage": None} if with_usage else {}

        def chunk(delta: dict, finish: str | None = None, odds: dict | None = None) -> dict:
            choice = {"index": 0, "delta": delta, "logprobs": odds, "finish_reason": finish}
            return head | {"choices": [choice], "obfuscation": "fake"} | more

        yield chunk({"role": "assistant", "content": None if answer.calls else "", "refusal": None})
        for i, call in enumerate(answer.calls):
            function = call["function"]
            yield chunk({"tool_calls": [{"index": i} | call | {"function": function | {"arguments": ""}}]})
            for piece in function["arguments"].partition(" "):
                yield chunk({"tool_calls": [{"index": i, "function": {"arguments": piece}}]})
        if answer.refusal:
            yield chunk({"refusal": answer.refusal})
        elif not answer.calls:
            for i, word in enumerate(answer.words):
                yield chunk({"content": word}, odds=answer.logprobs if i == 0 else None)
        yield chunk({}, answer.finish)
        if with_usage:
            yield head | {"choices": [], "usage": self.usage(answer), "obfuscation": "fake"}
