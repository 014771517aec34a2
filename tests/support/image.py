"""What deploy/Containerfile says, for the tests that do what it says without an engine, and with one."""

import re
import shutil
from pathlib import Path, PurePosixPath

from .gateway import PROJECT

CONTAINERFILE = PROJECT / "deploy/Containerfile"


def commands() -> tuple[list[str], list[str]]:
    """The commands that build the image and run it, from the comment that the file begins with."""
    build, run = re.findall(r"^# (podman .*)$", CONTAINERFILE.read_text(), re.MULTILINE)
    return build.split(), run.split()


def stages() -> list[list[tuple[str, str]]]:
    """The instructions as (word, rest), a list for each stage."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[tuple[str, str]]] = []
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def values(stage: list[tuple[str, str]], word: str) -> list[str]:
    """What a stage says after each `word`."""
    return [rest for each, rest in stage if each == word]


def environ() -> dict[str, str]:
    """The variables that the image sets."""
    return dict(item.split("=", 1) for line in values(stages()[-1], "ENV") for item in line.split())


def copied(stage: list[tuple[str, str]]) -> list[str]:
    """The patterns of the files that a stage takes from the project."""
    lines = [line.split()[:-1] for line in values(stage, "COPY")]
    return [pattern for line in lines if not line[0].startswith("--from") for pattern in line]


def handed() -> list[str]:
    """The patterns of the files that the builder is handed."""
    lines = Path(f"{CONTAINERFILE}.dockerignore").read_text().splitlines()
    return [line[1:] for line in lines if line.startswith("!")]


def matches(file: str, patterns: list[str]) -> bool:
    """Whether a file is meant by one of the patterns, where * stands for no slash, as it does for a builder."""
    return any(
        len(PurePosixPath(file).parts) == len(PurePosixPath(each).parts) and PurePosixPath(file).match(each) for each in patterns
    )


def lay_out(folder: Path) -> Path:
    """Copy into `folder` what the image has of the project: what the last stage takes of what the builder is handed."""
    for path in (path for pattern in copied(stages()[-1]) for path in PROJECT.glob(pattern)):
        file = path.relative_to(PROJECT)
        if matches(str(file), handed()):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / file)
    return folder
