"""The report of a trained model: one HTML file that needs nothing else, to be opened, sent or kept.

`page.html`, `page.css` and `page.js` beside this file are put together with the numbers of one model. Text is coloured,
and experts are chosen, in the browser; what it needs for that lies in the page as JSON.
"""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from remoe.errors import DataError
from remoe.lab.analysis import figures, routing_figures
from remoe.lab.analysis.collect import collect
from remoe.lab.analysis.measures import inactive_below
from remoe.lab.analysis.summary import CHUNK, RoutingSummary, routing_of
from remoe.lab.evaluation.trained import Trained, open_trained
from remoe.lab.files import atomic_write
from remoe.lab.report.contents import Excerpt, excerpts, experts_of, facts, thinned, training_records, wanted_of
from remoe.lab.training.checkpoint import saved_step

BATCH_TOKENS = 8192
LOSS_WINDOW = 20  # records of a moving mean


def write_report(path: str, data: str | None, out: Path | None, *, max_tokens: int, excerpt_tokens: int) -> Path:
    """Runs a trained model over validation text, and writes a page about its routing.

    Args:
        path: a run's folder, one of its checkpoints, or the folder of a saved or exported model of ours.
        data: prepared data; None for the data that the run was trained with.
        out: the file; by default report.html in that folder, report-step-N.html in its run's for a checkpoint.
        max_tokens: validation tokens that the numbers are taken over, shared out over the domains.
        excerpt_tokens: tokens of each domain that are shown as text; at most the model's window.

    Returns:
        The file.

    Raises:
        CheckpointError: when there is no usable model, or its data is not known.
        DataError: when the data was made with another tokenizer, or the page cannot be written.
    """
    trained = open_trained(path, data)
    # At once: a run that goes on soon throws the checkpoint away.
    step = saved_step(trained.checkpoint) if trained.run else None
    out = out or _place(trained, Path(path), step)
    if not os.access(out.parent, os.W_OK):  # found out before the work, not after it
        raise DataError(f"{out.parent} cannot be written: choose a file with --out")
    windows = trained.windows("validation")
    routing, texts = None, []
    if trained.model.config.routes_pairs:
        batch_size = max(1, BATCH_TOKENS // windows.seq_len)
        record = collect(trained.model, windows, max_tokens, batch_size)
        wanted = wanted_of(trained.model.config)
        routing = routing_of(record, wanted, lambda token: trained.tokenizer.decode([token]))
        texts = excerpts(trained, windows, excerpt_tokens)
    atomic_write(out, _page(trained, step, routing, texts).encode())
    return out


def _place(trained: Trained, path: Path, step: int | None) -> Path:
    if trained.run is None:
        return path / "report.html"
    given = path.resolve() == trained.checkpoint.resolve()
    return trained.run.path / (f"report-step-{step}.html" if given else "report.html")


def _page(trained: Trained, step: int | None, routing: RoutingSummary | None, texts: list[Excerpt]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("remoe.lab.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["source"] = lambda name: Markup(environment.loader.get_source(environment, name)[0])
    environment.filters["percent"] = _percent
    c = trained.model.config
    return environment.get_template("page.html").render(
        title=(trained.run.path if trained.run else trained.checkpoint).resolve().name,
        facts=facts(trained, step),
        config=c,
        steered=c.steered and c.sparsity_rule != "none",
        experts=experts_of(c),
        wanted=wanted_of(c),
        chunk=CHUNK,
        routing=routing,
        little=inactive_below(experts_of(c), wanted_of(c)),
        pictures=_pictures(trained, step, routing),
        content=_json(_content(routing, texts)),
    )


def _percent(share: float) -> str:
    """Two digits, or three of 100."""
    percent = 100 * share
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}" if percent >= 0.995 else f"{percent:.2f}"


def _content(routing: RoutingSummary | None, texts: list[Excerpt]) -> dict[str, Any]:
    if routing is None:
        return {}
    return {
        "domains": routing.domains,
        "domainShare": routing.share_CLE,
        "top": routing.top_tokens,
        "excerpts": [vars(excerpt) for excerpt in texts],
    }


def _json(content: dict[str, Any]) -> Markup:
    """JSON that ends no script element, whatever the text in it."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _pictures(trained: Trained, step: int | None, routing: RoutingSummary | None) -> dict[str, str]:
    """Figures as addresses of images, by name; those that the run and the model allow."""
    c = trained.model.config
    experts, wanted = experts_of(c), wanted_of(c)
    drawn: dict[str, Figure] = {}
    if routing is not None:
        if routing.figures.frequency_correlation is not None:
            points = {c.router: (routing.count_U, routing.active_U)}
            drawn["frequency"] = routing_figures.active_against_frequency(points)
        drawn["domains"] = routing_figures.routed_share_by_domain(routing.share_CLE, routing.domains, wanted)
    if records := training_records(trained, step):
        few = thinned(records)
        losses = ([record["step"] for record in few], [record["lm_loss"] for record in few])
        drawn["loss"] = figures.training_losses({c.router: losses}, window=LOSS_WINDOW)
        if c.steered:
            target = 1 - wanted / experts
            drawn["course"] = figures.training_course({c.router: few}, target)
            drawn["course-log"] = figures.training_course({c.router: few}, target, log_steps=True)
        if c.routes_pairs:
            steps, loads = zip(*((record["step"], record["load_per_expert"]) for record in records), strict=True)
            drawn["load"] = routing_figures.load_course(steps, loads, wanted)
        if flips := [(record["step"], record["flip_rate"]) for record in records if "flip_rate" in record]:
            drawn["flips"] = routing_figures.flips({c.router: tuple(zip(*flips, strict=True))}, {c.router: experts})
    return {name: _image(figure) for name, figure in drawn.items()}


def _image(figure: Figure) -> str:
    svg = io.BytesIO()
    figures.write_svg(figure, svg)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
