"""The built-in corpus: code without docstrings, docstrings and manual, whose texts do not overlap."""

import ast
import sysconfig
from pathlib import Path

import pytest

from remoe.errors import DataError
from remoe.lab.data.stdlib import StdlibSource, separate_docstrings

MODULE = '''#!/usr/bin/env python
"""Module prose.

    Indented é.
"""
import os


class Only:
    """Class prose."""


class C(Exception): "one line prose"


def f(a):
    """Function prose."""
    x = """not a docstring"""
    async def inner():
        r"""Inner \\d prose."""; y = 1
    return x
'''


def test_docstrings_are_cut_out_and_the_code_still_parses() -> None:
    code, prose = separate_docstrings(MODULE)
    assert prose.split("\n\n") == [
        "Module prose.",
        "Indented é.",
        "Class prose.",
        "one line prose",
        "Function prose.",
        "Inner \\d prose.",
    ]
    assert "prose" not in code
    assert 'x = """not a docstring"""' in code
    assert code.startswith("#!/usr/bin/env python\nimport os\n")
    assert "class Only:\n    ...\n" in code
    assert "        ...; y = 1\n" in code
    ast.parse(code)


@pytest.mark.parametrize("name", ["argparse.py", "dataclasses.py", "json/decoder.py", "asyncio/events.py"])
def test_no_docstring_line_is_left_in_a_module(name: str) -> None:
    source = Path(sysconfig.get_path("stdlib"), name).read_text(encoding="utf-8")
    code, prose = separate_docstrings(source)
    assert not any(
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    code_lines = {line.strip() for line in code.splitlines()}
    prose_lines = {line.strip() for line in prose.splitlines() if len(line.strip()) > 30}
    assert len(prose_lines) > 10
    assert not prose_lines & code_lines
    assert returns(source) == returns(code)


def returns(source: str) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)]


def test_corpus_skips_tests_and_files_that_do_not_parse(tmp_path: Path) -> None:
    for folder in ("pkg", "test", "pkg/tests", "site-packages", "pydoc_data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").write_text('"""Prose."""\nx = 1\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "undecodable.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    source = StdlibSource(root=tmp_path)
    documents = [item for item in source.documents() if item.domain != "manual"]
    assert [(item.domain, item.group) for item in documents] == [
        ("code", "stdlib/latin.py"),
        ("code", "stdlib/pkg/m.py"),
        ("docstrings", "stdlib/pkg/m.py"),
    ]
    assert "é" in documents[0].text
    assert source.note() == "stdlib: skipped 2 files that do not parse"


def test_running_library_has_modules_and_a_manual(tmp_path: Path) -> None:
    files = StdlibSource().files
    assert len(files) > 300
    assert not [path for path in files if {"test", "site-packages"} & set(path.parts[:-1])]
    (tmp_path / "m.py").write_text("x = 1\n")
    manual = [item for item in StdlibSource(root=tmp_path).documents() if item.domain == "manual"]
    assert len(manual) > 50
    assert sum(item.num_bytes for item in manual) > 200_000


def test_python_without_sources_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no source files"):
        list(StdlibSource(root=tmp_path).documents())
    with pytest.raises(DataError, match="has no source files"):
        list(StdlibSource(root=tmp_path / "python311.zip").documents())
