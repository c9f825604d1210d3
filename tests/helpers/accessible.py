"""What axe-core finds wrong with a page in a browser."""

import pytest


def serious_findings(page, *rules):
    """Rule, element and reason of each finding that axe-core calls serious or critical; by all rules, or these alone.

    Skips where axe-core is not installed.
    """
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
    return [
        (one["id"], node["html"][:200], node["failureSummary"])
        for one in axe.Axe().run(page, options=options).response["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def check_accessible(page):
    """Asserts that there are no such findings, light and dark, and that a fault is one."""
    assert serious_findings(page) == []
    page.emulate_media(color_scheme="dark")
    assert serious_findings(page, "color-contrast") == []
    page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    assert [rule for rule, *_ in serious_findings(page, "button-name")] == ["button-name"]
