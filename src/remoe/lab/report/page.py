"""The report of a trained model: a single HTML file that needs no other file and no network.

It combines `page.html`, `page.css` and `page.js` from this folder with the numbers of one model. The script colours the
text and shows the experts that the reader selects, from JSON in the page.
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
from remoe.lab.outputs import check_output, is_report, write_output
from remoe.lab.report.contents import (
    Excerpt,
    excerpts,
    facts,
    outcome,
    thinned,
    training_records,
)
from remoe.lab.text import lines, short_name
from remoe.lab.training.checkpoint import saved_step

BATCH_TOKENS = 8192
LOSS_WINDOW = 20  # records in the moving mean


def write_report(path: str, data: str | None, out: Path | None, *, max_tokens: int, excerpt_tokens: int) -> Path:
    """Runs a trained model over validation text, and writes a page about its routing.

    Args:
        path: a run's folder, one of its checkpoints, or the folder of a saved or exported remoe model.
        data: folder of prepared data; None for the data that the run was trained on.
        out: the file to write; by default report.html in the folder of the run or model, and for a checkpoint
            report-step-N.html in the folder of its run.
        max_tokens: approximate number of validation tokens to measure on, divided among the domains by size.
        excerpt_tokens: number of tokens of each domain to show as text; at most the model's window.

    Returns:
        The file.

    Raises:
        CheckpointError: if there is no usable model, or its data is unknown.
        DataError: if the data was made with another tokenizer, or the page cannot be written.
    """
    trained = open_trained(path, data)
    # Read first, because a run that is still training soon deletes the checkpoint.
    step = saved_step(trained.checkpoint) if trained.run else None
    if out is None:
        out = _place(trained, Path(path), step)
        check_output("--out", out, is_report)  # the default may be a file of the user's own
    if not os.access(out.parent, os.W_OK):  # checked before the work, not after it
        raise DataError(f"{out.parent} cannot be written: choose a file with --out")
    windows = trained.windows("validation")
    routing, texts = None, []
    if trained.model.config.routes_pairs:
        batch_size = max(1, BATCH_TOKENS // windows.seq_len)
        record = collect(trained.model, windows, max_tokens, batch_size)
        routing = routing_of(
            record, trained.model.config.active_per_token, lambda token: trained.tokenizer.decode([token])
        )
        texts = excerpts(trained, windows, excerpt_tokens)
    write_output(out, _page(trained, step, routing, texts).encode())
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
    environment.filters["percent"] = percent
    c = trained.model.config
    return environment.get_template("page.html").render(
        title=short_name((trained.run.path if trained.run else trained.checkpoint).resolve().name),
        facts=facts(trained, step),
        outcome=outcome(trained, step),
        config=c,
        steered=c.steered and c.sparsity["rule"] != "none",
        experts=c.experts_per_layer,
        target=c.active_per_token,
        chunk=CHUNK,
        routing=routing,
        inactive_below=inactive_below(c.experts_per_layer, c.active_per_token),
        pictures=_pictures(trained, step, routing),
        content=script_json(_content(routing, texts)),
    )


def percent(share: float) -> str:
    """A share in percent with two significant digits; 100 for everything."""
    value = 100 * share
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def _content(routing: RoutingSummary | None, texts: list[Excerpt]) -> dict[str, Any]:
    if routing is None:
        return {}
    return {
        "domains": [short_name(domain) for domain in routing.domains],
        "domainShare": routing.share_CLE,
        "top": [[[lines(token) for token in tokens] for tokens in experts] for experts in routing.top_tokens],
        "excerpts": [
            {"domain": short_name(one.domain), "tokens": [lines(token) for token in one.tokens], "gates": one.gates}
            for one in texts
        ],
    }


def script_json(content: dict[str, Any]) -> Markup:
    """JSON that cannot end the script element, whatever texts it contains."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _pictures(trained: Trained, step: int | None, routing: RoutingSummary | None) -> dict[str, str]:
    """Those figures that the run and the model have data for, as data URLs, by name."""
    c = trained.model.config
    experts, active = c.experts_per_layer, c.active_per_token
    drawn: dict[str, Figure] = {}
    if routing is not None:
        if routing.figures.frequency_correlation is not None:
            points = {c.router: (routing.count_U, routing.active_U)}
            drawn["frequency"] = routing_figures.active_against_frequency(points)
        drawn["domains"] = routing_figures.routed_share_by_domain(routing.share_CLE, routing.domains, active)
    if records := training_records(trained, step):
        few = thinned(records)
        losses = ([record["step"] for record in few], [record["lm_loss"] for record in few])
        drawn["loss"] = figures.training_losses({c.router: losses}, window=LOSS_WINDOW)
        if c.steered:
            target = 1 - active / experts
            drawn["course"] = figures.training_course({c.router: few}, target)
            drawn["course-log"] = figures.training_course({c.router: few}, target, log_steps=True)
        if c.routes_pairs:
            steps, loads = zip(*((record["step"], record["load_per_expert"]) for record in records), strict=True)
            drawn["load"] = routing_figures.load_course(steps, loads, active)
        if flips := [(record["step"], record["flip_rate"]) for record in records if "flip_rate" in record]:
            drawn["flips"] = routing_figures.flips({c.router: tuple(zip(*flips, strict=True))}, {c.router: experts})
    return {name: _image(figure) for name, figure in drawn.items()}


def _image(figure: Figure) -> str:
    svg = io.BytesIO()
    figures.write_svg(figure, svg)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
