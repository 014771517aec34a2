"""Exchanges as data: what a caller sends, what the vendor sees and answers, what the caller gets. See tests/exchanges/."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import yaml

from .calls import ALL_KEYS, events
from .vendors import VENDORS, Answer, Scripted, Vendors, vector

FOLDER = Path(__file__).parent.parent / "exchanges"
HI = [{"role": "user", "content": "Hi"}]

GONE = "gone"  # The value of what was there before and is not afterwards.
NOTHING = "nothing"  # What arrives at a vendor that is not called.

# What the server adds to each call of the Responses API: it always streams from the vendor.
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def changes(before: Any, after: Any, path: str = "") -> dict[str, Any]:
    """What differs, by its path: the value afterwards, or GONE."""

    def at(key: object) -> str:
        return f"{path}.{key}" if path else str(key)

    if isinstance(before, list) and isinstance(after, list):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {} if same(before, after) else {path: after}
    found = {}
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            found[at(key)] = GONE
        elif key not in before:
            found[at(key)] = after[key]
        else:
            found |= changes(before[key], after[key], at(key))
    return found


def same(before: Any, after: Any) -> bool:
    """Whether two values are the same JSON. Python takes true for 1."""
    return before == after and isinstance(before, bool) == isinstance(after, bool)


def shortened(told: Any, got: Any) -> Any:
    """`got`, in which a text ends where the one of `told` ends in an ellipsis."""
    if isinstance(told, dict) and isinstance(got, dict):
        return {key: shortened(told.get(key), value) for key, value in got.items()}
    if isinstance(told, str) and isinstance(got, str) and told.endswith("…"):
        return f"{got[: len(told) - 1]}…"
    return got


def includes(whole: Any, part: Any) -> bool:
    """Whether `whole` has `part`: of an object the keys that `part` names, of a list each item. GONE says: not there."""
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(
            key not in whole if value == GONE else key in whole and includes(whole[key], value) for key, value in part.items()
        )
    if isinstance(whole, list) and isinstance(part, list):
        return len(whole) == len(part) and all(map(includes, whole, part))
    return same(whole, part)


def without_gained_nulls(before: Any, after: Any) -> Any:
    """`after` without what is null there and was not there before."""
    if isinstance(before, list) and isinstance(after, list):
        return [without_gained_nulls(*pair) for pair in zip(before, after, strict=False)] + after[len(before) :]
    if isinstance(before, dict) and isinstance(after, dict):
        return {
            key: without_gained_nulls(before.get(key), value)
            for key, value in after.items()
            if key in before or value is not None
        }
    return after


@dataclass
class Exchange:
    """One exchange of a list in tests/exchanges.

    `send` is what the caller sends beside a plain question to `provider`. `arrives` is what the vendor sees of it, and `gets` what
    the caller gets: what changes on the way, by its path, with `gone` for what is lost and `nothing` for a vendor that is not
    called; an error has its `status` and some of its `words`. For the Responses API both are what comes, not what changes, and
    `faithful` is what either would be if nothing were lost.

    `answer` is the vendor's: `json` or `text` as a whole, or the ordinary one with another `message`, `choice`, or `more` fields,
    with a `status`, `headers`, or `gzip`. A stream has its `events` or `choices` (the first delta `times` as long, `done: false`
    for no end), and may come `bytewise`. Nulls that the server adds count as a change where `exact` says so.

    `row` is its row in docs/differences.md, `passes` its item under “What passes” there. `around` shows the row's way around: the
    fields that differ from this exchange, or those of `send` that go `inside` an `extra_body` and then arrive as the `whole`.
    """

    name: str
    to: str
    send: dict = field(default_factory=dict)
    provider: str = "openai"
    arrives: Any = None
    answer: dict = field(default_factory=dict)
    gets: dict = field(default_factory=dict)
    faithful: dict = field(default_factory=dict)
    exact: bool = False
    row: str = ""
    passes: str = ""
    around: dict = field(default_factory=dict)
    whole: dict | None = None

    @property
    def translated(self) -> bool:
        """Whether the server makes another call of this one."""
        return self.to == "responses"

    @property
    def body(self) -> dict:
        """What the caller sends, but for the model."""
        asked: dict = {"responses": {"input": "Hi"}, "embeddings": {"input": "Hi"}}.get(self.to, {"messages": HI})
        return asked | self.send

    @property
    def detour(self) -> "Exchange | None":
        """The exchange that proves the way around."""
        if not self.around:
            return None
        told = self.around.copy()
        if fields := told.pop("inside", None):
            outside = {name: value for name, value in self.send.items() if name not in fields}
            told |= {"send": outside | {"extra_body": {name: self.body[name] for name in fields}}, "whole": self.body}
        same_as_here = {"to": self.to, "provider": self.provider, "answer": self.answer, "send": self.send}
        return Exchange(**same_as_here | {"name": f"around: {self.name}"} | told)


@cache
def exchanges() -> list[Exchange]:
    """All exchanges. Each file is named for the path that its calls go to."""
    paths = {"chat": "chat/completions"}
    return [
        Exchange(**{"to": paths.get(file.stem, file.stem)} | each)
        for file in sorted(FOLDER.glob("*.yaml"))
        if file.stem != "elsewhere"
        for each in yaml.safe_load(file.read_text())
    ]


@cache
def elsewhere() -> dict[str, dict[str, str]]:
    """The rows, and the ways around, that no exchange can show, each with the test that does."""
    return yaml.safe_load((FOLDER / "elsewhere.yaml").read_text())


def event(data: Any) -> bytes:
    """A server-sent event of an object, or a text as it is."""
    return data.encode() if isinstance(data, str) else f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class Script:
    """What the vendor answers to an exchange: `told` as objects, and the bytes of it."""

    def __init__(self, exchange: Exchange) -> None:
        self.answer, self.stream = exchange.answer, exchange.translated or bool(exchange.body.get("stream"))
        vendor = next((each for each in VENDORS.values() if exchange.provider.startswith(each.name)), VENDORS["api.openai.com"])
        ok = Answer("m", "Hi", "ok")
        self.told: Any
        if "json" in self.answer:
            self.told, self.stream = self.answer["json"], False
        elif "text" in self.answer:
            self.told, self.stream = self.answer["text"], False
        elif exchange.to == "embeddings":
            self.told = vendor.embeddings("m", [{"object": "embedding", "embedding": vector("Hi", 2), "index": 0}])
        elif self.stream:
            self.told = list(self.chunks(list(vendor.chunks(ok, exchange.translated))))
        else:
            self.told = vendor.chat(ok)
            if message := self.answer.get("message"):
                self.told["choices"][0]["message"] = {"role": "assistant"} | message
            self.told |= self.answer.get("more", {})
            self.told["choices"][0] |= self.answer.get("choice", {})

    def chunks(self, ordinary: list[dict]) -> Iterator[Any]:
        """The events of a stream: those that `answer` has, or the ordinary ones."""
        head = {name: value for name, value in ordinary[0].items() if name in ("id", "object", "created", "model")}
        yield from self.answer.get("events", [])
        for choice in self.answer.get("choices", []):
            chunk = head | {"choices": [{"index": 0} | {name: value for name, value in choice.items() if name != "more"}]}
            if times := self.answer.get("times"):
                chunk["choices"][0]["delta"] = {"content": choice["delta"]["content"] * times}
            yield {name: value for name, value in (chunk | choice.get("more", {})).items() if value != GONE}
        if not {"events", "choices"} & set(self.answer):
            yield from ordinary
        if self.answer.get("done", True):
            yield "data: [DONE]\n\n"

    @property
    def scripted(self) -> Scripted:
        """The answer as it is sent."""
        status, headers = self.answer.get("status", 200), self.answer.get("headers", {})
        if self.stream:
            pieces = [event(each) for each in self.told]
        elif isinstance(self.told, str):
            pieces = [self.told.encode()]
        else:
            pieces = [json.dumps(self.told).encode()]
        if self.answer.get("gzip"):
            pieces, headers = [gzip.compress(b"".join(pieces))], headers | {"content-encoding": "gzip"}
        if self.answer.get("bytewise"):
            pieces = [bytes([byte]) for byte in b"".join(pieces)]
        return Scripted(status, {"content-type": "text/event-stream" if self.stream else "application/json"} | headers, pieces)


class Run:
    """An exchange that took place: what was sent, arrived, was told and came back."""

    def __init__(
        self, exchange: Exchange, client: httpx.Client, vendors: Vendors, model: str, headers: dict[str, str] = ALL_KEYS
    ) -> None:
        self.exchange, self.script, self.model = exchange, Script(exchange), model
        vendors.scripted[model] = self.script.scripted
        before = len(vendors.seen)
        body = {"model": f"{exchange.provider}/{model}"} | exchange.body
        self.answer = client.post(f"/v1/{exchange.to}", headers=headers, json=body)
        self.calls = [seen for seen in list(vendors.seen)[before:] if seen.json["model"] == model]
        self.arrived = {name: value for name, value in self.calls[-1].json.items() if name != "model"} if self.calls else NOTHING

    @property
    def streamed(self) -> bool:
        return "event-stream" in self.answer.headers.get("content-type", "")

    @property
    def got(self) -> Any:
        """What the caller got: an object, or those of a stream. The model is called `exchange` in it, whatever its number."""
        got = events(self.answer) if self.streamed else self.answer.json()
        return json.loads(json.dumps(got).replace(self.model, "exchange"))

    def differs(self) -> dict[str, Any]:
        """What was not as the exchange tells: `arrived` at the vendor, or `got` by the caller."""
        told = self.exchange
        if told.translated:
            wanted = NOTHING if told.arrives == NOTHING else STREAMED | (told.arrives or {"messages": HI})
            arrived, as_arrived = changes(wanted, self.arrived), same(wanted, self.arrived)
            got, as_got = f"{self.answer.status_code} {self.answer.text}", self.came_back(told.gets)
        else:
            arrived = changes(told.whole, self.arrived) if told.whole else self.changed_on_the_way_there()
            as_arrived = same(arrived, {} if told.whole else told.arrives or {})
            got = self.changed_on_the_way_back()
            as_got = (
                got.get("status") == told.gets["status"] if "status" in told.gets else same(told.gets, shortened(told.gets, got))
            )
            as_got = as_got and told.gets.get("words", "") in got.get("words", "")
        found = {} if as_arrived else {"arrived": arrived or "unchanged"}
        return found if as_got else found | {"got": got or "unchanged"}

    # Of what is passed on: chat and embeddings.

    def changed_on_the_way_there(self) -> Any:
        """What the vendor saw that the caller had not sent: NOTHING, or the changes."""
        return NOTHING if self.arrived == NOTHING else changes(self.exchange.body, self.arrived)

    def changed_on_the_way_back(self) -> dict:
        """What the caller got that the vendor had not told: the status and words of an error, or the changes."""
        status = self.script.answer.get("status", 200)
        if self.answer.status_code != status or self.arrived == NOTHING:
            return {"status": self.answer.status_code, "words": self.answer.text}
        told, got = self.script.told, self.got
        if self.exchange.exact:
            return changes(told, got)
        if isinstance(told, list):
            told = [parsed(each) for each in told if parsed(each) is not None]
        found = changes(told, without_gained_nulls(told, got))
        return {path: value for path, value in found.items() if path.rpartition(".")[2] != "model"}

    # Of what is translated: the Responses API.

    @property
    def final(self) -> dict:
        """The response, which a stream has in its last event."""
        return self.got[-1].get("response", {}) if self.streamed else self.got

    def came_back(self, told: dict) -> bool:
        """Whether the caller got what `told` says: `status` and `words` of an error, `events` of a stream, and of the response.

        A response has a status of its own, which is a word.
        """
        told = told.copy()
        status = told.pop("status") if isinstance(told.get("status"), int) else 200
        words, kinds = told.pop("words", ""), told.pop("events", None)
        if self.answer.status_code != status or words not in self.answer.text:
            return False
        if kinds is not None:
            types = {each.get("type") for each in kinds}
            if not includes([each for each in self.got if each.get("type") in types], kinds):
                return False
        return not told or includes(self.final, told)


def parsed(data: Any) -> Any:
    """An event that is written out as text, as an object; None for what is no JSON, such as a comment or the end."""
    if not isinstance(data, str):
        return data
    text = "".join(line.partition(":")[2].strip() for line in data.splitlines() if line.startswith("data:"))
    try:
        return json.loads(text)
    except ValueError:
        return None
