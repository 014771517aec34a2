"""What a stand-in says, before a vendor puts it into its own shape: chosen by the model's name."""

import re
import uuid
from dataclasses import dataclass, field
from typing import Any

# What the models `tool-call` and `tool-calls` ask for, and the JSON text that `structured` answers with.
TOOL_CALL = {"id": "call_fake", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL_CALLS = [TOOL_CALL, TOOL_CALL | {"id": "call_two", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
STRUCTURED = '{"city": "Paris", "degrees": 21}'
REFUSAL = "I cannot help with that."

CREATED = 1_700_000_000


@dataclass
class Answer:
    """What a stand-in answers to a chat call: text, or calls of tools, and why it ends."""

    model: str
    prompt: str
    text: str
    calls: list[dict] = field(default_factory=list)
    finish: str = "stop"
    refusal: str | None = None
    logprobs: dict | None = None

    @property
    def words(self) -> list[str]:
        """The pieces in which the text is streamed."""
        if self.model.startswith("big-"):
            return [self.text[start : start + 10_000] for start in range(0, len(self.text), 10_000)]
        return [word if i == 0 else f" {word}" for i, word in enumerate(self.text.split(" "))]

    @property
    def usage(self) -> dict:
        """Token counts, a word being a token here."""
        asked, answered = len(self.prompt.split()), len(self.text.split())
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def new_id(prefix: str) -> str:
    """An id for an answer. No two are alike, because the server would keep two chats of one id as one."""
    return f"{prefix}fake{uuid.uuid4().hex}"


def text_of(messages: list[dict]) -> str:
    """The text of the last message, whether its content is a string or a list of parts."""
    content = messages[-1].get("content") or ""
    if isinstance(content, list):
        content = " ".join(part.get("text", f"[{part['type']}]") for part in content)
    return content


def answer(title: str, body: dict) -> Answer:
    """What the stand-in for the vendor `title` says to a chat call. It gives the prompt back so that callers can be told apart."""
    model, prompt = body["model"], text_of(body["messages"])
    said = Answer(model, prompt, f"This is a stand-in for {title}, not {model} itself. You said: {prompt}")
    if size := re.fullmatch(r"big-(\d+)", model):
        said.text = "x" * int(size[1]) * 1_000_000
    match model:
        case "tool-call" | "tool-calls" if body["messages"][-1]["role"] != "tool":
            said.calls = [TOOL_CALL] if model == "tool-call" else TOOL_CALLS
            said.text, said.finish = "", "tool_calls"
        case "structured":
            said.text = STRUCTURED
        case "length":
            said.finish = "length"
        case "content-filter":
            said.finish = "content_filter"
        case "refusal":
            said.text, said.refusal = "", REFUSAL
        case "logprobs":
            odds = {"token": "This", "logprob": -0.1, "bytes": [84, 104, 105, 115]}
            said.logprobs = {"content": [odds | {"top_logprobs": [odds]}], "refusal": None}
        case "no-top-logprobs":
            odds = {"token": "This", "logprob": -0.1, "bytes": [84, 104, 105, 115], "top_logprobs": []}
            said.logprobs = {"content": [odds], "refusal": None}
    return said


class Refused(Exception):
    """The vendor refuses a call: a status and the body of its error."""

    def __init__(self, status: int, body: Any) -> None:
        self.status, self.body = status, body
