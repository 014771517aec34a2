"""The README's table of traps is the one that `make traps` wrote."""

import pytest
from world.gateway import PROJECT


def rows(text: str) -> list[str]:
    """The lines of the Markdown tables in a text."""
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_readme_has_the_measured_table() -> None:
    _, begins, rest = (PROJECT / "README.md").read_text().partition("<!-- traps -->")
    if not begins:
        pytest.skip("The README has no <!-- traps --> and <!-- /traps --> markers yet.")
    table, ends, _ = rest.partition("<!-- /traps -->")
    assert ends
    assert rows(table) == rows((PROJECT / "tests" / "traps.md").read_text())
