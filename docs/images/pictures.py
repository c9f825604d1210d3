"""A hook of mkdocs: pages show pictures of `experiments/` from where they are, which is outside `docs/`."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((?:\.\./)+(experiments/[^)]+\.png)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds each picture that a page shows."""
    root = Path(config.config_file_path).parent
    shown = {path for page in files.documentation_pages() for path in LINK.findall(page.content_string)}
    for path in sorted(shown):
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points to the pictures from the page, as if `experiments/` were in `docs/`."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(rf"]({up}\1)", markdown)
