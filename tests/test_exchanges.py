"""The tables of docs/differences.md are true, and have all: each exchange of tests/exchanges takes place with the real gateway."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import httpx
import pytest
from support.exchanges import NOTHING, STREAMED, Exchange, Run, elsewhere, exchanges
from support.gateway import PROJECT
from support.vendors import Vendors

PAGE = (PROJECT / "docs/differences.md").read_text()
ALL = exchanges()
IDS = [f"{each.to}: {each.name}" for each in ALL]
AROUND = [each for each in ALL if each.around]


def rows() -> dict[tuple[str, str], str]:
    """The rows of the page's tables: by section and what it is about, the way around."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        for line in re.findall(r"^\| (?!what)(.*) ?\|$", section, re.MULTILINE):
            what, _, around = (cell.strip() for cell in line.split(" | "))
            key = (section.partition("\n")[0], what)
            assert key not in found, "A row is there twice."
            found[key] = around
    return found


def key(exchange: Exchange) -> tuple[str, str]:
    """The row of an exchange: in the section of its path, or in that of every call."""
    own = {"embeddings": "Embeddings", "responses": "The Responses API"}.get(exchange.to, "Chat Completions")
    return (own if (own, exchange.row) in rows() else "Every call", exchange.row)


def passes() -> list[str]:
    """What the page says that passes, item by item."""
    told = PAGE.partition("\n## What passes\n")[2].partition("\n## ")[0]
    return [" ".join(item.split()) for item in re.findall(r"^- (.*(?:\n  .*)*)", told, re.MULTILINE)]


@pytest.mark.parametrize("exchange", ALL, ids=IDS)
def test_an_exchange_goes_as_told(client: httpx.Client, vendors: Vendors, exchange: Exchange) -> None:
    run = Run(exchange, client, vendors, f"exchange-{ALL.index(exchange)}")
    assert run.differs() == {}
    for half, part in exchange.faithful.items():
        met = run.came_back(part) if half == "gets" else run.arrived == STREAMED | part
        assert not met, f"It is as if nothing was changed: {half} {part}"


@pytest.mark.parametrize("exchange", AROUND, ids=[each.name for each in AROUND])
def test_the_way_around_works(client: httpx.Client, vendors: Vendors, exchange: Exchange) -> None:
    assert Run(exchange.detour, client, vendors, f"around-{ALL.index(exchange)}").differs() == {}


REFUSED = [
    each
    for each in ALL
    if each.translated and each.arrives == NOTHING and not each.send.get("stream") and each.row != "`background`"  # Has its own.
]


@pytest.mark.parametrize("exchange", REFUSED, ids=[each.name for each in REFUSED])
def test_what_the_responses_api_refuses_it_refuses_in_a_stream_too(
    client: httpx.Client, vendors: Vendors, exchange: Exchange
) -> None:
    """A stream that is refused late has begun, and says so in an event of its own, or as failed."""
    streamed = dataclasses.replace(exchange, send=exchange.send | {"stream": True})
    run = Run(streamed, client, vendors, f"refused-{ALL.index(exchange)}")
    assert run.arrived == NOTHING
    assert exchange.gets["words"] in run.answer.text
    if run.answer.status_code == 200:
        last = run.got[-1]
        assert last.get("error") or last["response"]["error"], last
    else:
        assert run.answer.status_code == exchange.gets["status"]


def test_what_is_changed_has_a_row() -> None:
    """An exchange has a row if, and only if, the caller or the vendor gets something else; then it is not said to pass."""

    def changed(exchange: Exchange) -> bool:
        if exchange.translated:
            return bool(exchange.faithful) or isinstance(exchange.gets.get("status"), int)
        return bool(exchange.arrives or exchange.gets)

    wrong = [
        name for name, each in zip(IDS, ALL, strict=True) if changed(each) != bool(each.row) or (changed(each) and each.passes)
    ]
    assert wrong == []


def test_each_row_has_an_exchange_and_each_exchange_its_row() -> None:
    shown = {key(each) for each in ALL if each.row}
    assert {row for row in rows() if row[1] not in elsewhere()["rows"]} == shown
    assert set(elsewhere()["rows"]) <= {what for _, what in rows()}


def test_each_way_around_is_proven() -> None:
    told = {row for row, around in rows().items() if around}
    assert {row for row in told if row[1] not in elsewhere()["around"]} == {key(each) for each in AROUND}
    assert set(elsewhere()["around"]) <= {what for _, what in told}


def test_what_is_said_to_pass_is_what_was_seen_to() -> None:
    assert sorted(passes()) == sorted({each.passes for each in ALL if each.passes})


def test_what_no_exchange_can_show_is_shown_by_a_test() -> None:
    for test in {**elsewhere()["rows"], **elsewhere()["around"]}.values():
        file, _, name = test.partition("::")
        tree = ast.parse((Path(__file__).parent / file).read_text())
        assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}, test


def test_no_two_exchanges_are_the_same() -> None:
    assert len(set(IDS)) == len(IDS)
    told = [json.dumps([each.exact, each.to, each.provider, each.send, each.answer]) for each in ALL]
    assert [IDS[i] for i, each in enumerate(told) if told.index(each) != i] == []
