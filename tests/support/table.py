"""Markdown tables, as all the tools here write them."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table that reads well in a terminal too. The first `text` columns are words, the others figures, to the right."""
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def padded(line: list[str]) -> str:
        cells = [
            cell.rjust(width) if i >= text else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (width + 1) + ("-:"[i >= text]) for i, width in enumerate(widths))
    return "\n".join([padded(lines[0]), f"|{rule}|", *map(padded, lines[1:])])
