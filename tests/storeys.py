"""Checks the storeys of the package: `python tests/storeys.py` prints them, and exits with 1 if a rule is broken.

A lower storey never imports a higher one, at module level, inside a function or for a type checker; no modules import
each other in a circle; each storey imports only the packages that its installation brings. The front door,
`remoe/__init__.py`, may name higher modules in strings, which it imports on first use.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"

# From the lowest up: name, what belongs to it, and the packages it may import beside the standard library and those of
# the storeys below (None: any). The method imports triton and sonicmoe only to run their kernels.
STOREYS: dict[str, tuple[tuple[str, ...], frozenset[str] | None]] = {
    "method": (
        ("", "costs", "decoding", "errors", "layer", "matmul", "operators", "sparsity", "stages", "routing", "experts"),
        frozenset({"torch", "triton", "sonicmoe"}),
    ),
    "models": (
        ("models", "convert", "integrations"),
        frozenset({"transformers", "safetensors", "huggingface_hub", "torchao", "megatron", "peft", "vllm"}),
    ),
    "lab": (("lab", "plots", "__main__"), None),
}
ORDER = list(STOREYS)


@dataclass
class Module:
    """One source file: its dotted name, lines, and what it imports as (line, dotted name)."""

    name: str
    path: Path
    package: str
    imports: list[tuple[int, str]] = field(default_factory=list)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text())

    @property
    def lines(self) -> int:
        return len(self.path.read_text().splitlines())


class Package:
    """All modules of a package, found below `source`."""

    def __init__(self, source: Path | None = None, root: str = "remoe") -> None:
        source = source or SOURCE
        self.root, self.modules = root, {}
        for path in sorted((source / root).rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            inside = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if inside else parts)
            self.modules[name] = Module(name, path, name if inside else ".".join(parts[:-1]))
        # names that the front door imports on first use, and their modules: {"MoE": "layer"}
        self.lazy = dict(_constant_pairs(self.modules[root].tree))
        for module in self.modules.values():
            module.imports = sorted(set(self._imports(module)))

    def storey(self, name: str) -> str | None:
        """The storey of a dotted name inside the package; None if it belongs to none."""
        top = [*name.split("."), ""][1]
        if top and not any(m == f"{self.root}.{top}" for m in self.modules):
            top = ""  # a name defined in the front door itself
        return next((storey for storey, (tops, _) in STOREYS.items() if top in tops), None)

    def _imports(self, module: Module) -> Iterator[tuple[int, str]]:
        constants = dict(_constant_names(module.tree))
        for node in ast.walk(module.tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = module.package.split(".")
                    base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
                names = [f"{base}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
                names = [_text(node.args[0], constants)] if module.name != self.root else []
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.root:
                names = [f"{self.root}.{node.attr}"]
            yield from ((node.lineno, self._home(name)) for name in names if name)

    def _home(self, name: str) -> str:
        """The module that an imported name is in: `remoe.layer` for `remoe.layer.MoE` and for `remoe.MoE`."""
        if name.split(".")[0] != self.root:
            return name.split(".")[0]
        parts = name.split(".")
        if len(parts) > 1 and f"{self.root}.{parts[1]}" not in self.modules and parts[1] in self.lazy:
            home = self.lazy[parts[1]]
            return home if home in self.modules else f"{self.root}.{home}"
        while len(parts) > 1 and ".".join(parts) not in self.modules:
            parts.pop()
        return ".".join(parts)

    def strays(self) -> list[str]:
        """Files that belong to no storey."""
        return [
            f"{module.name} belongs to no storey" for module in self.modules.values() if not self.storey(module.name)
        ]

    def upward(self) -> list[str]:
        """Imports of a higher storey from a lower one."""
        found = []
        for module in self.modules.values():
            for line, target in module.imports:
                here, there = self.storey(module.name), self.storey(target)
                inside = target.split(".")[0] == self.root
                if inside and here and there and ORDER.index(there) > ORDER.index(here):
                    found.append(f"{module.name}:{line} ({here}) imports {target} ({there})")
        return found

    def foreign(self) -> list[str]:
        """Imports of packages that the importing storey's installation does not bring."""
        found = []
        for module in self.modules.values():
            sets = [STOREYS[storey][1] for storey in ORDER[: ORDER.index(self.storey(module.name) or ORDER[-1]) + 1]]
            if None in sets:
                continue
            allowed = frozenset().union(*(packages for packages in sets if packages)) | sys.stdlib_module_names
            for line, target in module.imports:
                if target.split(".")[0] not in allowed | {self.root}:
                    found.append(f"{module.name}:{line} imports {target}")
        return found

    def circles(self) -> list[str]:
        """Groups of modules that import each other, directly or through others (strongly connected components)."""
        edges = {name: [t for _, t in m.imports if t in self.modules and t != name] for name, m in self.modules.items()}
        reach = {name: _reachable(name, edges) for name in edges}
        groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in edges if a in reach[a]}
        return sorted(" <-> ".join(sorted(group)) for group in groups)


def _reachable(start: str, edges: dict[str, list[str]]) -> set[str]:
    """All that can be reached from `start` by at least one edge."""
    seen: set[str] = set()
    todo = list(edges[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += edges[name]
    return seen


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    """What an expression is known to begin with: a constant, a module's constant, or the start of an f-string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return constants.get(node.id, "")
    if isinstance(node, ast.JoinedStr) and node.values:
        return _text(node.values[0], constants).rpartition(".")[0]
    return ""


def _constant_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((target.id, node.value.value) for target in node.targets if isinstance(target, ast.Name))


def _constant_pairs(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        for key, value in zip(table.keys, table.values, strict=True):
            texts = [n.value for n in (key, value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            if len(texts) == 2:
                yield texts[0], texts[1]


def main() -> int:
    """Prints the storeys and what breaks their rules; returns the exit code."""
    package = Package()
    for storey in reversed(ORDER):
        modules = [module for module in package.modules.values() if package.storey(module.name) == storey]
        print(f"{storey:<8}{len(modules):>5} files {sum(module.lines for module in modules):>8,} lines")
    rules = {
        "files without a storey": package.strays(),
        "imports upward": package.upward(),
        "packages not installed": package.foreign(),
        "circles": package.circles(),
    }
    for rule, broken in rules.items():
        print(f"{rule}: {len(broken)}")
        for line in broken:
            print(f"  {line}")
    return 1 if any(rules.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
