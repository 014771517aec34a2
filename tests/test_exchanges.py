"""The tables of docs/differences.md are true, and have all: each exchange of tests/exchanges takes place with the real gateway."""

import ast
import json
import re
from pathlib import Path

import httpx
import pytest
from support.exchanges import NOTHING, STREAMED, Exchange, Run, changes, elsewhere, exchanges, shortened
from support.gateway import PROJECT
from support.vendors import Vendors

PAGE = (PROJECT / "docs/differences.md").read_text()
ALL = exchanges()
IDS = [f"{each.to}: {each.name}" for each in ALL]
AROUND = [each for each in ALL if each.around]


def rows() -> list[list[str]]:
    """The rows of the tables of the page: what, what happens to it, the way around."""
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| ")]
    return [row for row in found if row[0] != "what"]


def passes() -> list[str]:
    """What the page says that passes, item by item."""
    told = PAGE.partition("\n## What passes\n")[2].partition("\n## ")[0]
    return [" ".join(item.split()) for item in re.findall(r"^- (.*(?:\n  .*)*)", told, re.MULTILINE)]


def check(run: Run, exchange: Exchange) -> None:
    """The exchange is as told: what arrived, and what came back."""
    if exchange.translated:
        wanted = exchange.arrives or {"messages": [{"role": "user", "content": "Hi"}]}
        assert changes(NOTHING if wanted == NOTHING else STREAMED | wanted, run.arrived) == {}
        assert run.came_back(exchange.gets), f"The caller got {run.answer.status_code} {run.answer.text}"
        return
    if exchange.whole:
        assert changes(exchange.whole, run.arrived) == {}
    else:
        assert run.changed_on_the_way_there() == (exchange.arrives or {})
    back = run.changed_on_the_way_back()
    if "status" in exchange.gets:
        assert back.get("status") == exchange.gets["status"], back
        assert exchange.gets.get("words", "") in back["words"]
    else:
        assert shortened(exchange.gets, back) == exchange.gets


@pytest.mark.parametrize("exchange", ALL, ids=IDS)
def test_an_exchange_goes_as_told(client: httpx.Client, vendors: Vendors, exchange: Exchange) -> None:
    run = Run(exchange, client, vendors, f"exchange-{ALL.index(exchange)}")
    check(run, exchange)
    for half, part in exchange.faithful.items():
        met = run.came_back(part) if half == "gets" else run.arrived == STREAMED | part
        assert not met, f"It is as if nothing was changed: {half} {part}"


@pytest.mark.parametrize("exchange", AROUND, ids=[each.name for each in AROUND])
def test_the_way_around_works(client: httpx.Client, vendors: Vendors, exchange: Exchange) -> None:
    detour = exchange.detour
    assert detour
    check(Run(detour, client, vendors, f"around-{ALL.index(exchange)}"), detour)


@pytest.mark.parametrize("exchange", ALL, ids=IDS)
def test_what_is_changed_has_a_row(exchange: Exchange) -> None:
    changed = bool(exchange.arrives or exchange.gets)
    if exchange.translated:
        changed = bool(exchange.faithful) or isinstance(exchange.gets.get("status"), int)
    assert changed == bool(exchange.row), "An exchange has a row if, and only if, the caller or the vendor gets something else."
    assert not (changed and exchange.passes)


def test_each_row_has_an_exchange_and_each_exchange_its_row() -> None:
    shown = {row[0] for row in rows()}
    assert len(shown) == len(rows()), "A row is there twice."
    assert shown == {each.row for each in ALL if each.row} | set(elsewhere()["rows"])


def test_each_way_around_is_proven() -> None:
    told = {row[0] for row in rows() if row[2]}
    assert told == {each.row for each in AROUND} | set(elsewhere()["around"])


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
