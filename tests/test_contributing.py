"""CONTRIBUTING.md: its examples are complete, its tests pass, and the files that it names exist."""

import re
from pathlib import Path

import pytest

import remoe
from remoe.routing import ROUTERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_pass_their_own_tests(number):
    before, names = dict(ROUTERS), {"__name__": "example"}
    try:
        exec(compile(EXAMPLES[number], "CONTRIBUTING.md", "exec"), names)
        if "ROUTERS" in names:
            remoe.MoE(16, 32, 4, 2, router=next(name for name in ROUTERS if name not in before))
        tests = [value for name, value in names.items() if name.startswith("test_")]
        assert tests
        for test in tests:
            test()
    finally:
        ROUTERS.clear()
        ROUTERS.update(before)


def test_the_files_exist():
    named = re.findall(r"`((?:src|tests|docs|\.ci)/[\w./]+)`", TEXT)
    named = [name for name in named if "NAME" not in name]
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_changelog_names_modules_that_exist():
    """The right column of its table of moved modules, and the left column no longer."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| (`remoe\.[a-z_.]+`.*?) \| (`remoe\.[a-z_.]+`.*?) \|$", changelog, flags=re.MULTILINE)
    assert len(rows) > 10
    for old, new in rows:
        names = [[name.replace(".", "/") for name in re.findall(r"`([a-z_.]+)`", cell)] for cell in (old, new)]
        exists = [
            [bool([*(ROOT / "src").glob(f"{name}.py"), *(ROOT / "src").glob(f"{name}/*.py")]) for name in n]
            for n in names
        ]
        assert exists == [[False] * len(names[0]), [True] * len(names[1])], (old, new)
