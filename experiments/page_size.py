"""Measures the page of a large run: its size, the time to open it, and how long it takes to answer each control.

    python experiments/page_size.py --out experiments/results/page-size.json

The numbers on the page are random, so that nothing compresses by chance; a real run of this size would take weeks. The
browser is headless Chromium (Playwright for Python). An action's time ends when the next frame has been drawn. Writing
a CSV file gives the browser time in between, so for these buttons the longest single block counts.

Legend: L layers, T tokens, E experts.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Page, sync_playwright

from remoe.lab.analysis.record import About, RecordWriter, RoutingRecord
from remoe.lab.machine import machine
from remoe.lab.outputs import write_output
from remoe.lab.report.course import course_of
from remoe.lab.report.page import render
from remoe.lab.report.sections import page_data

BLOCK = 2500  # tokens written at a time
DOMAINS = ("books", "code", "science", "speeches")
VOCABULARY, WORD = 32_000, 5
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Finds what a reader can do, as [name, selector, number among the selected, kind].
ACTIONS = """() => {
  const found = [];
  const add = (selector, kind, name) => document.querySelectorAll(selector).forEach((one, i) => {
    const figure = one.closest("figure, section");
    const what = name || one.getAttribute("aria-label") || one.textContent;
    found.push([`${figure ? figure.id : ""}: ${what}`, selector, i, kind]);
  });
  add("select", "select");
  add("input[type=checkbox]", "click", "checkbox");
  add("input[type=search]", "search", "search");
  add("button:not(.csv)", "click");
  add(".map", "key", "arrow key in the map");
  add(".map canvas", "click", "click on the map");
  add(".lines", "key", "arrow key in the curves");
  add("#excerpt", "key", "arrow key in the text");
  add("#excerpt", "scroll", "scroll to the end");
  add("#excerpt", "frames", "longest frame of 120 while it scrolls by 240 px each");
  add(".csv", "csv", "CSV");
  return found;
}"""
# Does one of them; returns the milliseconds until the next frame, of the longest frame, or of the longest block of a
# CSV file.
DO = """async ([name, selector, index, kind]) => {
  const one = document.querySelectorAll(selector)[index];
  const frame = () => new Promise((goOn) => requestAnimationFrame(() => setTimeout(goOn)));
  one.scrollIntoView({ block: "center" });
  await frame();
  await frame();
  const blocks = [];
  const watch = new PerformanceObserver((list) => blocks.push(...list.getEntries().map((entry) => entry.duration)));
  watch.observe({ type: "longtask" });
  const began = performance.now();
  if (kind === "select") {
    one.selectedIndex = (one.selectedIndex + 1) % one.options.length;
    one.dispatchEvent(new Event("change", { bubbles: true }));
  } else if (kind === "search") {
    one.value = "word";
    one.dispatchEvent(new Event("input", { bubbles: true }));
  } else if (kind === "key") one.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  else if (kind === "scroll") one.scrollTop = one.scrollHeight;
  else if (kind === "frames") {
    one.scrollTop = 0;
    let longest = 0, last = await new Promise(requestAnimationFrame);
    for (let i = 0; i < 120; i++) {
      one.scrollTop += 240;
      const now = await new Promise(requestAnimationFrame);
      longest = Math.max(longest, now - last);
      last = now;
    }
    return longest;
  } else if (kind === "csv") {
    const saved = new Promise((goOn) => { URL.createObjectURL = () => goOn() || "#"; });
    HTMLAnchorElement.prototype.click = () => {};
    one.click();
    await saved;
    await frame();
    await frame();
    return Math.max(0, ...blocks);
  } else {
    const box = one.getBoundingClientRect();
    const event = { bubbles: true, clientX: box.left + box.width / 2, clientY: box.top + box.height / 3 };
    one.dispatchEvent(new MouseEvent("click", event));
  }
  await frame();
  return performance.now() - began;
}"""


def write_record(path: Path, layers: int, experts: int, k: int, tokens: int) -> RoutingRecord:
    """A record of random routing in which a token has k experts of each layer on average."""
    generator = torch.Generator().manual_seed(0)
    with RecordWriter(path, About(layers, experts, k, "relu", steered=True, domains=list(DOMAINS))) as writer:
        for start in range(0, tokens, BLOCK):
            T = min(BLOCK, tokens - start)
            active = [torch.rand(T, experts, generator=generator) < k / experts for _ in range(layers)]
            token_T = torch.randint(VOCABULARY, (T,), generator=generator)
            words = [f" word{token % 997:0{WORD}d}" + "\n" * (i % 17 == 0) for i, token in enumerate(token_T.tolist())]
            writer.append(
                sequence_T=torch.full((T,), start // BLOCK),
                domains=[DOMAINS[start * len(DOMAINS) // tokens]] * T,
                token_T=token_T,
                loss_T=torch.rand(T, generator=generator) * 8,
                active_LTE=active,
                gate_LTE=[torch.rand(T, experts, generator=generator) for _ in active],
                texts=words,
            )
    return RoutingRecord(path)


def records_of_steps(layers: int, experts: int, k: int, steps: int) -> Iterator[dict[str, Any]]:
    """Random records, as metrics.jsonl has them."""
    generator = torch.Generator().manual_seed(1)
    loads = [(torch.rand(layers, experts, generator=generator) * 2 * k / experts).tolist() for _ in range(50)]
    numbers = torch.rand(steps, 8, generator=generator).tolist()
    names = ("lm_loss", "reg_loss", "lambda", "sparsity", "grad_norm", "lr", "tokens_per_second", "memory_bytes")
    for step, row in enumerate(numbers, 1):
        stage = "dense" if step < steps // 100 else "sparsifying" if step < steps // 50 else "sparse"
        flips = {"flip_rate": row[0] / 10} if step % 10 == 0 else {}
        record = {"step": step, "stage": stage, "load_per_expert": loads[step % len(loads)], **flips}
        yield record | dict(zip(names, row, strict=True)) | {"sparsity_per_layer": (row * layers)[:layers]}


def page_of(layers: int, experts: int, k: int, steps: int, tokens: int) -> str:
    """The whole page, with every section that does not need a model, and effects of experts."""
    with tempfile.TemporaryDirectory() as folder:
        record = write_record(Path(folder) / "record.parquet", layers, experts, k, tokens)
        data = page_data(None, None, record, excerpt_tokens=tokens)
    effects = torch.rand(len(DOMAINS), layers, experts).round(decimals=5)
    data["experts"]["effect"] = {
        "tokens": tokens, "domains": list(DOMAINS), "domainTokens": [tokens // len(DOMAINS)] * len(DOMAINS),
        "all": effects[0].tolist(), "byDomain": effects.tolist(),
    }  # fmt: skip
    data["training"] = course_of(records_of_steps(layers, experts, k, steps), experts, k, 1 - k / experts)
    return render(data)


def measure(page: Page, path: Path) -> dict[str, Any]:
    """Seconds to open the page, and milliseconds of each action."""
    start = time.perf_counter()
    page.goto(f"file://{path}", wait_until="load")
    page.evaluate("new Promise((goOn) => requestAnimationFrame(() => setTimeout(goOn)))")
    opened = time.perf_counter() - start
    taken = {action[0]: page.evaluate(DO, action) for action in page.evaluate(ACTIONS)}
    slowest = max(taken, key=taken.get)
    shown = page.evaluate("remoe.data.text.texts.reduce((sum, text) => sum + text.tokens.length, 0)")
    return {
        "tokens shown": shown,
        "seconds to open": round(opened, 2),
        "actions": len(taken),
        "slowest action": slowest,
        "slowest action, ms": round(taken[slowest]),
        "ms": {name: round(ms) for name, ms in sorted(taken.items(), key=lambda item: -item[1])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Size and speed of the page of a large run.")
    for name, number in {"layers": 24, "experts": 128, "k": 2, "steps": 60_000, "tokens": 50_000}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--page", type=Path, help="a page to measure; by default a new one is made")
    parser.add_argument("--keep", type=Path, help="where to keep the page")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("layers", "experts", "k", "steps", "tokens")}
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as one:
        path = options.page or options.keep or Path(folder) / "page.html"
        if options.page is None:
            write_output(path, page_of(**sizes).encode())
        browser = one.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        found = {"sizes": sizes, "megabytes": round(path.stat().st_size / 1e6, 2), **measure(page, path.resolve())}
        found |= {"browser": browser.version, "machine": machine(torch.device("cpu"))}
        browser.close()
    print(json.dumps({name: value for name, value in found.items() if name != "ms"}, indent=2))
    if options.out:
        write_output(options.out, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
