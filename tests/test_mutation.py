"""The lists of `make mutants` are up to date: each change can still be made, and the tests that must notice it exist."""

import ast
from functools import cache
from pathlib import Path

from support.gateway import PROJECT
from tools.mutation import Mutant, mutants


@cache
def functions(file: Path) -> set[str]:
    """The names of the functions in a Python file."""
    return {each.name for each in ast.parse(file.read_text()).body if isinstance(each, ast.FunctionDef)}


def wrong_with(mutant: Mutant) -> str:
    """What is wrong with an entry of the lists, or nothing."""
    text = (PROJECT / mutant.file).read_text()
    try:
        if mutant.applied_to(text) == text:
            return "It changes nothing."
    except ValueError as error:
        return str(error)
    if bool(mutant.tests) == bool(mutant.survives):
        return "It is caught by a test, or survives for a reason."
    tests = [test.partition("[")[0].partition("::") for test in mutant.tests]
    missing = [f"{file}::{name}" for file, _, name in tests if name not in functions(PROJECT / file)]
    return f"There is no {', '.join(missing)}." if missing else ""


def test_every_mutant_applies_and_names_tests_that_exist() -> None:
    found = {str(mutant): wrong_with(mutant) for mutant in mutants()}
    assert {mutant: why for mutant, why in found.items() if why} == {}


def test_no_two_mutants_are_the_same() -> None:
    all_of_them = mutants()
    assert len({str(mutant) for mutant in all_of_them}) == len(all_of_them)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in all_of_them}) == len(all_of_them)
