"""Programs that people use, as docs/programs.md says: each section is followed word for word. `make programs` runs them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gateway import HAPROXY, Gateway
from support.network import NameServer
from support.programs import FOLDER, PAGE, EveryPath, Program, programs, versions

PROGRAMS = programs()


def rows() -> dict[str, str]:
    """The table of the page: by program, the version."""
    return dict(re.findall(r"^\| \[(.*?)\].* \| (.*?) \|$", PAGE, re.MULTILINE))


def test_the_table_has_the_version_that_answered() -> None:
    """Those that are not run say so."""
    assert {name: version for name, version in rows().items() if version != "not run"} == versions()
    assert set(versions()) == {program.name for program in PROGRAMS}


@pytest.mark.parametrize("name", rows())
def test_each_row_has_a_section(name: str) -> None:
    assert f"\n## {name}\n".lower() in PAGE.lower()
    assert all(program.section for program in PROGRAMS if program.name == name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, EveryPath]]:
    """A gateway with both of HAProxy's doors, and stand-ins that answer at every path."""
    if not HAPROXY:
        pytest.skip("HAProxy is not installed: programs that have no place for a header need it")
    with EveryPath() as vendors, NameServer() as names:
        settings = vendors.settings(names) | {"FRONT": "1", "EGRESS": "1"}
        with Gateway(tmp_path_factory.mktemp("gateway"), **settings) as gateway:
            yield gateway, vendors


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=[program.name for program in PROGRAMS])
def test_a_program_is_answered(program: Program, world: tuple[Gateway, EveryPath], tmp_path: Path) -> None:
    gateway, vendors = world
    try:
        version = program.install(tmp_path)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    before = len(vendors.seen)
    printed = program.run(tmp_path, gateway.url)
    calls = {f"{seen.vendor} {seen.path}" for seen in list(vendors.seen)[before:]}
    print(f"\n{program.name} {version}: {' · '.join(sorted(calls)) or 'called nobody'}")
    assert program.says in printed, printed[-3000:]
    assert calls == {program.calls}
    found = versions() | {program.name: version}
    (FOLDER / "versions.json").write_text(json.dumps(found, indent=2) + "\n")
