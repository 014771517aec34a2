"""The lists of `make mutants` are up to date: each change can still be made, and the tests that must notice it exist."""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from support.gateway import PROJECT
from tools.mutation import Mutant, mutants

MUTANTS = mutants()


def ids(mutants: Iterable[Mutant]) -> list[str]:
    return [str(mutant) for mutant in mutants]


@cache
def functions(file: Path) -> set[str]:
    """The names of the functions in a Python file."""
    return {each.name for each in ast.parse(file.read_text()).body if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize("mutant", MUTANTS, ids=ids(MUTANTS))
def test_every_mutant_applies_and_names_tests_that_exist(mutant: Mutant) -> None:
    text = (PROJECT / mutant.file).read_text()
    assert mutant.applied_to(text) != text
    assert bool(mutant.tests) != bool(mutant.survives), "A mutant is caught by a test, or survives for a reason."
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(PROJECT / file)


def test_no_two_mutants_are_the_same() -> None:
    assert len(set(ids(MUTANTS))) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
