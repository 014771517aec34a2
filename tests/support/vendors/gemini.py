"""Gemini's shape on its OpenAI-compatible endpoint: https://ai.google.dev/gemini-api/docs/openai, and what it really answers.

It leaves out what it has no value for, where OpenAI says null.
"""

from collections.abc import Iterator
from typing import Any

from .answer import CREATED, Answer, Refused, new_id
from .vendor import Vendor

STATUSES = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}

# The parameters that it knows; any other is refused.
KNOWN = {
    *("model", "messages", "n", "stop", "stream", "stream_options", "seed", "temperature", "top_p"),
    *("max_tokens", "max_completion_tokens", "modalities", "reasoning_effort", "response_format"),
    *("tools", "tool_choice", "parallel_tool_calls", "presence_penalty", "logprobs", "top_logprobs", "user", "extra_body"),
}

# Gemini 3 says what it thought in a signature, and refuses a call whose history has lost it.
SIGNATURE = {"google": {"thought_signature": "c2lnbmF0dXJl"}}

# Of its tokens, some are those of thoughts, which neither count has.
THOUGHTS = 5

MALFORMED = "function_call_filter: MALFORMED_FUNCTION_CALL"


class Gemini(Vendor):
    """generativelanguage.googleapis.com, which answers at the doubled path as well."""

    name, title = "gemini", "Google"
    prefixes = ("/v1beta/openai", "/v1beta/openai/v1")
    bad_key = (400, "API key not valid. Please pass a valid API key.")

    def error(self, status: int, message: str, details: list[dict] | None = None) -> list:
        """An error is the one item of a list."""
        error: dict[str, Any] = {"code": status, "message": message, "status": STATUSES.get(status, "INTERNAL")}
        return [{"error": error | ({"details": details} if details else {})}]

    def check(self, body: dict) -> None:
        if unknown := [name for name in body if name not in KNOWN]:
            words = [f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.' for name in unknown]
            violations = [{"description": each} for each in words]
            details = [{"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": violations}]
            raise Refused(400, self.error(400, "\n".join(words), details))
        if body["model"].startswith("gemini-3"):
            calls = [message["tool_calls"][0] for message in body["messages"] if message.get("tool_calls")]
            if any(call.get("extra_content") != SIGNATURE for call in calls):
                raise Refused(400, self.error(400, "Function call is missing a thought_signature in functionCall parts."))

    def no_such_model(self, model: str) -> str:
        return f"models/{model} is not found for API version v1main, or is not supported for generateContent."

    @staticmethod
    def usage(answer: Answer, words: int | None = None) -> dict:
        """Counts whose total is above their sum."""
        asked = answer.usage["prompt_tokens"]
        answered = answer.usage["completion_tokens"] if words is None else words
        return {"completion_tokens": answered, "prompt_tokens": asked, "total_tokens": asked + answered + THOUGHTS}

    @staticmethod
    def calls(answer: Answer) -> list[dict]:
        """The calls of tools: the first with what it thought, where the model is one that tells."""
        signed = answer.model.startswith("gemini-3")
        return [({"extra_content": SIGNATURE} if signed and i == 0 else {}) | call for i, call in enumerate(answer.calls)]

    def chat(self, answer: Answer) -> dict:
        message: dict[str, Any] = {"role": "assistant"}
        if answer.calls:
            message["tool_calls"] = self.calls(answer)
        else:
            message["content"] = answer.text
            if answer.model.startswith("gemini-3"):
                message["extra_content"] = SIGNATURE
        choice = {"finish_reason": answer.finish, "index": 0, "message": message}
        if answer.model == "malformed":
            choice = {"finish_reason": MALFORMED, "index": 0, "message": {"role": "assistant"}}
        return {
            "choices": [choice],
            "created": CREATED,
            "id": new_id(""),
            "model": answer.model,
            "object": "chat.completion",
            "usage": self.usage(answer),
        }

    def chunks(self, answer: Answer, with_usage: bool) -> Iterator[dict]:
        """Usage comes in each chunk and not alone; a call of a tool is whole, has no index, and the answer ends with `stop`."""
        tail = {"created": CREATED, "id": new_id(""), "model": answer.model, "object": "chat.completion.chunk"}
        if answer.model == "no-id":
            del tail["id"]

        def chunk(delta: dict, words: int, finish: str | None = None) -> dict:
            choice = {"delta": delta | {"role": "assistant"}} | ({"finish_reason": finish} if finish else {}) | {"index": 0}
            return {"choices": [choice]} | tail | ({"usage": self.usage(answer, words)} if with_usage else {})

        if answer.model == "malformed":
            yield chunk({}, 0, MALFORMED)
            return
        deltas: list[dict] = [{"tool_calls": [call]} for call in self.calls(answer)]
        deltas = deltas or [{"content": word} for word in answer.words]
        finish = "stop" if answer.calls else answer.finish
        for i, delta in enumerate(deltas, 1):
            yield chunk(delta, i, finish if i == len(deltas) else None)

    def embeddings(self, model: str, data: list[dict]) -> dict:
        """Without `usage`, and without an `index` that is 0."""
        data = [{name: value for name, value in item.items() if name != "index" or value} for item in data]
        return {"object": "list", "data": data, "model": model}
