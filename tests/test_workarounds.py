"""The table of traps is the one that `make workarounds` wrote, and what it undoes is still there to be undone."""

import ast

import pytest
from support.gateway import PROJECT

EDITS = [
    pytest.param(*(argument.value for argument in call.args), id=f"{file.stem}-{call.lineno}")
    for file in sorted((PROJECT / "tests" / "tools" / "workarounds").glob("*.py"))
    for call in ast.walk(ast.parse(file.read_text()))
    if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Edit"
    if all(isinstance(argument, ast.Constant) for argument in call.args)
]


def rows(text: str) -> list[list[str]]:
    """The cells of the Markdown tables in a text, but for the line under a table's head."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return [[cell.strip() for cell in cells] for cells in lines]


def test_a_document_has_the_measured_table() -> None:
    texts = [path.read_text() for path in (PROJECT / "README.md", PROJECT / "tests" / "README.md") if path.exists()]
    (text,) = [text for text in texts if "<!-- workarounds -->" in text]
    table = text.partition("<!-- workarounds -->")[2].partition("<!-- /workarounds -->")[0]
    assert rows(table) == rows((PROJECT / "tests" / "tools" / "workarounds" / "results.md").read_text())


@pytest.mark.parametrize(("name", "old", "new"), EDITS)
def test_what_a_trap_undoes_is_there(name: str, old: str, new: str) -> None:
    text = (PROJECT / name).read_text()
    assert text.replace(old, new) != text
