"""docs/reliability.md names a test for every fault, and each of them is there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = (TESTS.parent / "docs/reliability.md").read_text(encoding="utf-8")


def table() -> dict[int, tuple[str, list[str]]]:
    """Number -> exit code, tests."""
    found = {}
    for line in DOCUMENT.splitlines():
        if row := re.match(r"\| (\d+) \| .* \| (\d+) \| ([^|]*) \|$", line):
            number, code, tests = row.groups()
            assert int(number) not in found, f"row {number} stands there twice"
            found[int(number)] = code, re.findall(r"`([^`]+)`", tests)
    return found


def test_every_fault_has_its_row_with_an_exit_code_and_tests():
    rows = table()
    assert sorted(rows) == list(range(1, 41))
    assert {code for code, _ in rows.values()} == {"0", "2", "3", "4", "5", "130"}
    assert all(tests for _, tests in rows.values())


def test_every_test_that_is_named_is_there():
    absent = []
    for number, (_, tests) in table().items():
        for test in tests:
            path, _, name = test.partition("::")
            tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            if name not in names or not name.startswith("test_"):
                absent.append(f"{number}: {test}")
    assert absent == []
