"""Our own sources as a flat folder of modules, which transformers' `trust_remote_code` can load.

transformers copies the modules that a module imports as `from .name import ...` and nothing else, from one folder. So
each source becomes one file, named by its path, and in its statements `from remoe.a.b import c` the module's name
becomes `.remoe_a_b`: the syntax tree says where it stands. No other character changes; what differs in such a folder,
the code finds out when it runs: the optional backends and kernels are absent (`remoe.experts.dispatch`,
`remoe.routing.pairs`), and custom operators are named by the folder (`remoe.operators`).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ENTRIES = {
    "remoe.models.configuration_remoe": "configuration_remoe",
    "remoe.models.modeling_remoe": "modeling_remoe",
    "remoe.models.classification": "classification_remoe",
}
AUTO_MAP = {
    "AutoConfig": "configuration_remoe.RemoeConfig",
    "AutoModel": "modeling_remoe.RemoeModel",
    "AutoModelForCausalLM": "modeling_remoe.RemoeForCausalLM",
    "AutoModelForSequenceClassification": "classification_remoe.RemoeForSequenceClassification",
}
FROM = b"from "


def write_bundle(out: Path) -> list[str]:
    """Writes the modules into a folder; returns their names, without ".py"."""
    sources = _closure()
    for module, source in sources.items():
        (out / f"{flat_name(module)}.py").write_bytes(relocated(source))
    return [flat_name(module) for module in sources]


def flat_name(module: str) -> str:
    """What a module of ours is called in the folder: "remoe.a.b" is "remoe_a_b", but for the entries."""
    return ENTRIES.get(module, module.replace(".", "_"))


def relocated(source: bytes) -> bytes:
    """A source whose imports of our modules are relative ones, of the names that these have in the folder.

    Raises:
        ValueError: for an import that cannot be written so: `import remoe.a` or `from remoe import a`.
    """
    lines = source.splitlines(keepends=True)
    for node in _our_imports(source):
        assert node.module is not None
        line, start = lines[node.lineno - 1], node.col_offset + len(FROM)
        end = start + len(node.module)
        if line[node.col_offset : end] != FROM + node.module.encode():
            raise ValueError(f"line {node.lineno}: an import of {node.module} is not written as `from {node.module}`")
        lines[node.lineno - 1] = line[:start] + f".{flat_name(node.module)}".encode() + line[end:]
    return b"".join(lines)


def _closure() -> dict[str, bytes]:
    """Sources of all modules of ours that the entries need."""
    found: dict[str, bytes] = {}
    waiting = [*ENTRIES]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = _file(module).read_bytes()
            waiting += [node.module for node in _our_imports(found[module]) if node.module is not None]
    return found


def _our_imports(source: bytes) -> Iterator[ast.ImportFrom]:
    """The statements `from remoe.a.b import ...`, at whatever level."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(f"line {node.lineno}: modules must be imported as `from remoe.a import b`")
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"line {node.lineno}: modules must be imported by their whole names")
        if isinstance(node, ast.ImportFrom) and node.module is not None and _is_ours(node.module):
            for alias in node.names:
                # `from .remoe_a import b` would look for b inside that file.
                if _file(f"{node.module}.{alias.name}").is_file():
                    raise ValueError(f"line {node.lineno}: {alias.name} is a module: import names from it instead")
            yield node


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE.name


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
