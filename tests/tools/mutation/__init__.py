"""Deliberate changes to the project, each with the test that must notice it: `make mutants` (see `__main__.py`)."""

from pathlib import Path
from typing import NamedTuple

import yaml

FOLDER = Path(__file__).parent


class Mutant(NamedTuple):
    """One change: `old`, which `file` has once, becomes `new`, and one of `tests` fails. `survives` is why none does."""

    area: str
    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"

    def applied_to(self, text: str) -> str:
        """The file's text with the change made. Raises ValueError unless `old` is there exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has the text that the mutant “{self.what}” replaces {count} times, not once.")
        return text.replace(self.old, self.new)


def mutants() -> list[Mutant]:
    """All that the lists beside this file hold. Each list is YAML: a file's name, and under it the changes to that file."""
    return [
        Mutant(
            area=path.stem,
            file=file,
            what=change["what"],
            old=str(change["old"]),
            new=str(change["new"] or ""),
            tests=tuple(f"tests/{name}" for name in change.get("caught by", "").split()),
            survives=change.get("survives", ""),
        )
        for path in sorted(FOLDER.glob("*.yaml"))
        for file, changes in yaml.safe_load(path.read_text()).items()
        for change in changes
    ]
