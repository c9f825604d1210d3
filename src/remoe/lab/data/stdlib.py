"""The built-in corpus: the running Python's standard library, divided into code, docstrings and manual."""

import ast
import inspect
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from remoe.errors import DataError
from remoe.lab.data.documents import Document, is_blank
from remoe.lab.files import Signature, files_signature, walk_files

# Tests; installed packages; `encodings`, which is mostly generated character tables, neither written code nor prose;
# and `pydoc_data`, whose text is the domain `manual`.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
    | {"encodings", "pydoc_data"}
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class StdlibSource:
    """Python's standard library in the domains `code`, `docstrings` and `manual`, whose texts do not overlap.

    The code and the docstrings of a file share a group. `root` is the folder of modules to read.
    """

    name: str = "stdlib"
    root: Path = field(default_factory=lambda: Path(sysconfig.get_path("stdlib")))
    skipped: int = 0

    @cached_property
    def files(self) -> list[Path]:
        """Modules to read; raises DataError if this Python was installed without its sources."""
        files = [path for path in walk_files(self.root) if self._is_read(path)] if self.root.is_dir() else []
        if not files:
            raise DataError(f"stdlib: this Python has no source files in {self.root}; name another source")
        return files

    def signature(self) -> Signature:
        return files_signature(self.files)

    def documents(self) -> Iterator[Document]:
        # parsing takes seconds and the texts only about 12 MB, so later passes reuse the first one's
        return iter(self._documents)

    def note(self) -> str | None:
        return f"stdlib: skipped {self.skipped} files that do not parse" if self.skipped else None

    @cached_property
    def _documents(self) -> list[Document]:
        found: list[Document] = []
        for path in self.files:
            group = f"stdlib/{path.relative_to(self.root).as_posix()}"
            try:
                with tokenize.open(path) as file:
                    code, prose = separate_docstrings(file.read())
            except (SyntaxError, UnicodeDecodeError, ValueError):
                self.skipped += 1
                continue
            found += [
                Document(text, domain, group)
                for text, domain in ((code, "code"), (prose, "docstrings"))
                if not is_blank(text)
            ]
        return found + list(_manual())

    def _is_read(self, path: Path) -> bool:
        if path.suffix != ".py" or path.name.startswith("_sysconfigdata"):  # the latter describes one build
            return False
        return SKIPPED_FOLDERS.isdisjoint(path.relative_to(self.root).parts[:-1])


def separate_docstrings(source: str) -> tuple[str, str]:
    """Divide a module's text into its code without docstrings, and its docstrings, cleaned and joined.

    A docstring that cannot simply be removed, such as a body's only statement, is replaced by `...`, so that the
    code still parses. Raises SyntaxError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in these modules, which do not concern the user
        tree = ast.parse(source)
    data = source.encode("utf-8")  # the tree counts columns in UTF-8 bytes
    line_starts = [0]
    for line in data.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    pieces: list[bytes] = []
    prose: list[str] = []
    done = 0
    for node, text in sorted(_docstrings(tree), key=lambda pair: pair[0].body[0].lineno):
        begin, end, substitute = _docstring_span(node, data, line_starts)
        pieces += [data[done:begin], substitute]
        prose.append(inspect.cleandoc(text))
        done = end
    pieces.append(data[done:])
    return b"".join(pieces).decode("utf-8"), "\n\n".join(part for part in prose if part)


def _docstring_span(node: Documented, data: bytes, line_starts: list[int]) -> tuple[int, int, bytes]:
    """First byte to cut out, the byte after the last, and the replacement."""
    expression = node.body[0]
    assert expression.end_lineno is not None
    assert expression.end_col_offset is not None
    first, after = line_starts[expression.lineno - 1], line_starts[expression.end_lineno]
    begin = first + expression.col_offset
    end = line_starts[expression.end_lineno - 1] + expression.end_col_offset
    has_own_lines = not data[first:begin].strip() and not data[end:after].strip()
    if has_own_lines and (len(node.body) > 1 or isinstance(node, ast.Module)):
        return first, after, b""
    return begin, end, b"..."


def _docstrings(tree: ast.Module) -> Iterator[tuple[Documented, str]]:
    for node in ast.walk(tree):
        if isinstance(node, Documented):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield node, text


def _manual() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        text = topics[name].strip()
        if text:
            yield Document(text + "\n", "manual")
