"""A browser for the tests of pages; they are skipped where Playwright for Python or Chromium is missing."""

import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as one:
        browser = one.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens a file; at the end, nothing but it was requested, and nothing went wrong."""
    wrong, contexts = [], []

    def opened(path, *, width=1400, scheme="light", place="", touch=False):
        window = {"width": width, "height": 900}
        context = browser.new_context(viewport=window, color_scheme=scheme, has_touch=touch, is_mobile=touch)
        contexts.append(context)
        page, address = context.new_page(), f"file://{path}"
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda asked: asked.url.startswith((address, "blob:")) or wrong.append(asked.url))
        page.goto(address + place)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
