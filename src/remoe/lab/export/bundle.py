"""Our own sources as a flat folder of modules, which transformers' `trust_remote_code` can load.

transformers copies the modules that a module imports as `from .name import ...` and nothing else, from one folder. So
each source becomes one file, named by its path, its imports rewritten. Left out are the backends of the experts, and
the kernels of the router, that need more than torch.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
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
BACKENDS = ("naive", "loop")
# What the bundle has instead of some lines of a source.
_CHANGES = {
    "remoe.experts.backends": {
        r"^BACKENDS = \(.*\)$": f"BACKENDS = {BACKENDS!r}",
        r"^_AUTO = \{.*\}$": '_AUTO = {"cpu": ("loop",), "cuda": ("loop",)}',
    },
    "remoe.routing.pairs": {r"^AVAILABLE = .*$": "AVAILABLE = False"},
}
_EVERYWHERE = {
    'import_module(f"remoe.experts.{name}")': 'import_module(f".remoe_experts_{name}", __package__)',
    # Operators are known by name in a whole process: each folder's get a name of their own.
    'custom_op("remoe::': 'custom_op("remoe_" + __name__.encode().hex() + "::',
}


def write_bundle(out: Path) -> list[str]:
    """Writes the modules into a folder; returns their names."""
    sources = _closure()
    for module, path in sources.items():
        (out / f"{_flat(module)}.py").write_text(_rewritten(module, path.read_text(), sources))
    # Modules that are imported by a name made at run time: the function is for transformers' search for imports.
    late = "".join(f"    from .{_flat(f'remoe.experts.{name}')} import __doc__  # noqa: F401\n" for name in BACKENDS)
    with (out / "modeling_remoe.py").open("a") as file:
        file.write(f"\n\ndef _also_needed() -> None:\n{late}")
    return [_flat(module) for module in sources]


def _closure() -> dict[str, Path]:
    """Every module of ours that the entries need, with its file."""
    found: dict[str, Path] = {}
    waiting = [*ENTRIES, *(f"remoe.experts.{name}" for name in BACKENDS)]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = _file(module)
            waiting += _imported(found[module].read_text())
    return found


def _imported(source: str) -> list[str]:
    """The modules of ours that a source imports, at whatever level."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "remoe":
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            modules += [part for part in parts if _is_module(part)] or [node.module]
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "remoe" for alias in node.names):
            raise AssertionError("our modules import each other as `from remoe.x import y`")
    return modules


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_module(name: str) -> bool:
    return _file(name).is_file()


def _flat(module: str) -> str:
    return ENTRIES.get(module, module.replace(".", "_"))


def _rewritten(module: str, source: str, sources: dict[str, Path]) -> str:
    for pattern, replacement in _CHANGES.get(module, {}).items():
        source, count = re.subn(pattern, replacement, source, flags=re.MULTILINE)
        assert count == 1, f"{module} has no line {pattern}"

    def import_line(match: re.Match) -> str:
        indent, package, names = match.groups()
        parts = [name.strip() for name in names.split(",")]
        if all(f"{package}.{name}" in sources for name in parts):  # `from remoe.experts import compiled`
            lines = [f"{indent}from .{_flat(f'{package}.{name}')} import __name__ as _{name}_name" for name in parts]
            lines += [f"{indent}import sys"]
            lines += [f"{indent}{name} = sys.modules[_{name}_name]" for name in parts]
            return "\n".join(lines)
        return f"{indent}from .{_flat(package)} import {names}"

    source = re.sub(r"^( *)from (remoe[\w.]*) import ([^\n(]+)$", import_line, source, flags=re.MULTILINE)
    several = r"^( *)from (remoe[\w.]*) import \("
    source = re.sub(several, lambda m: f"{m[1]}from .{_flat(m[2])} import (", source, flags=re.MULTILINE)
    for old, new in _EVERYWHERE.items():
        source = source.replace(old, new)
    return source
