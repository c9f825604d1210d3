"""Hooks of mkdocs: pictures of `experiments/`, which are outside `docs/`, and the modules of a package."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PICTURE = re.compile(r"\]\((?:\.\./)+(experiments/[^)]+\.png)\)")
MODULES = re.compile(r"^::: ([\w.]+)\.\*$", flags=re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds each picture that a page shows."""
    shown = {path for page in files.documentation_pages() for path in PICTURE.findall(page.content_string)}
    for path in sorted(shown):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points to the pictures as if `experiments/` were in `docs/`, and puts a package's modules where `::: NAME.*` is.

    Raises:
        FileNotFoundError: when a package has no modules.
    """
    up = "../" * page.file.src_uri.count("/")
    markdown = PICTURE.sub(rf"]({up}\1)", markdown)
    return MODULES.sub(lambda found: "\n".join(f"::: {name}\n" for name in _modules(found[1])), markdown)


def _modules(package: str) -> list[str]:
    """Public modules of a package and of the packages in it, by their full names."""
    source = ROOT / "src"
    files = sorted((source / package.replace(".", "/")).rglob("*.py"))
    if not files:
        raise FileNotFoundError(f"the API pages name {package}, which has no modules")
    paths = [path.relative_to(source).with_suffix("") for path in files]
    return [".".join(path.parts) for path in paths if not any(part.startswith("_") for part in path.parts)]
