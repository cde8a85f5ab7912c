"""``docs/parameters.md`` against the code: each parameter once, its default, a test that is there."""

import ast
import re
from pathlib import Path

import pytest

from diffsynth_pipe.config import RunConfig

TESTS = Path(__file__).parents[1]
ROW = re.compile(r"\| `(?P<name>\w+)` \| (?P<default>.*?) \| .+ \| (?P<acts>.+) \|")
PAGE = (TESTS.parent / "docs" / "parameters.md").read_text(encoding="utf-8")
ROWS = [match.groupdict() for match in map(ROW.fullmatch, PAGE.splitlines()) if match]


def default_of(field):
    if field.is_required():
        return "required"
    return "not set" if field.default is None else str(field.default)


def test_each_parameter_has_one_row_in_the_order_of_the_code():
    assert [row["name"] for row in ROWS] == list(RunConfig.model_fields)


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_row_tells_the_default(row):
    field = RunConfig.model_fields[row["name"]]
    default = default_of(field)
    assert row["default"] == (default.lower() if isinstance(field.default, bool) else default)


def test_the_tests_that_are_named_are_there():
    named = set(re.findall(r"`((?:unit|contract|integration|e2e)/\w+\.py)::(\w+)`", PAGE))
    functions = {
        file: {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        for file, _ in named
    }
    assert not [f"{file}::{name}" for file, name in named if name not in functions[file]]
    assert all(re.fullmatch(r"`(unit|contract|integration|e2e)/\w+\.py::test_\w+`", row["acts"]) for row in ROWS)
