"""The report of a trained model: a single HTML file that needs no other file and no network.

It combines `page.html`, `page.css` and `page.js` from this folder with the numbers of one model. The script colours the
text and shows the experts that the reader selects, from JSON in the page.
"""

import base64
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from remoe.errors import ConfigError, DataError
from remoe.lab.analysis import figures, routing_figures
from remoe.lab.analysis.measures import inactive_below
from remoe.lab.analysis.record import RoutingRecord, is_record
from remoe.lab.analysis.source import Source, open_source
from remoe.lab.analysis.summary import CHUNK, RoutingSummary, routing_of
from remoe.lab.outputs import check_output, is_report, write_output
from remoe.lab.report.contents import (
    Excerpt,
    excerpts,
    facts,
    outcome,
    thinned,
    training_records,
)
from remoe.lab.report.details import effects_of, experts_of, guesses_of
from remoe.lab.text import lines, short_name
from remoe.lab.training.checkpoint import saved_step
from remoe.models.configuration_remoe import RemoeConfig

LOSS_WINDOW = 20  # records in the moving mean


def write_report(
    path: str,
    data: str | None,
    out: Path | None,
    *,
    max_tokens: int,
    excerpt_tokens: int,
    prompt: str | None = None,
    effect_tokens: int = 0,
) -> Path:
    """Records the routing of a model on some text, or reads a record, and writes a page about it.

    Args:
        path: a run's folder, one of its checkpoints, the folder of any mixture that `Mixture` reads, or a record.
        data: folder of prepared data, or raw text; None for the data that the run was trained on.
        out: the file to write; by default report.html in the folder of the run or model, for a checkpoint
            report-step-N.html in the folder of its run, and for a record its name with the suffix .html.
        max_tokens: approximate number of tokens to measure on, divided among the domains by size.
        excerpt_tokens: number of tokens of each domain to show as text; at most the model's window.
        prompt: text to read instead of data.
        effect_tokens: number of tokens on which the effect of each expert on the loss is measured, which takes a
            forward pass for each expert; 0 for none.

    Returns:
        The file.

    Raises:
        CheckpointError: if there is no usable model, or its data is unknown.
        ConfigError: for a model without a mixture of experts, and for data or a prompt beside a record.
        DataError: if the data was made with another tokenizer, or the page cannot be written.
    """
    if is_record(path):
        if data is not None or prompt is not None or effect_tokens:
            raise ConfigError(
                f"{path} is a record of a text that was read: --data, --prompt and --effect-tokens do not go with it"
            )
        record, place = RoutingRecord(Path(path)), _checked(out, Path(path).with_suffix(".html"))
        content = _page(None, None, record, routing_of(record), excerpts(record, excerpt_tokens))
        write_output(place, content.encode())
        return place
    source = open_source(path, data, prompt, max_tokens=max_tokens)
    # Read first, because a run that is still training soon deletes the checkpoint.
    step = saved_step(source.checkpoint) if source.run else None
    place = _checked(out, _place(source, Path(path), step))
    if source.mixture is None:
        write_output(place, _page(source, step, None, None, []).encode())
        return place
    with tempfile.TemporaryDirectory() as folder:
        record = source.record(Path(folder) / "record.parquet")
        routing = routing_of(record, lambda token: source.tokenizer.decode([token]))
        effects = effects_of(source, routing.domains, effect_tokens) if effect_tokens else None
        content = _page(source, step, record, routing, excerpts(record, excerpt_tokens), effects)
    write_output(place, content.encode())
    return place


def _checked(out: Path | None, default: Path) -> Path:
    """The file to write, before any work is done."""
    if out is None:
        check_output("--out", default, is_report)  # the default may be a file of the user's own
    place = out or default
    if not os.access(place.parent, os.W_OK):
        raise DataError(f"{place.parent} cannot be written: choose a file with --out")
    return place


def _place(source: Source, path: Path, step: int | None) -> Path:
    if source.run is None:
        return path / "report.html"
    given = path.resolve() == source.checkpoint.resolve()
    return source.run.path / (f"report-step-{step}.html" if given else "report.html")


def _page(
    source: Source | None,
    step: int | None,
    record: RoutingRecord | None,
    routing: RoutingSummary | None,
    texts: list[Excerpt],
    effects: dict[str, Any] | None = None,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("remoe.lab.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["source"] = lambda name: Markup(environment.loader.get_source(environment, name)[0])
    environment.filters["percent"] = percent
    about, run = record and record.about, source and source.run
    named = record.path.stem if source is None else (run.path if run else source.checkpoint).resolve().name
    sizes = {"experts": about.experts, "target": about.k, "shared": about.shared_expert} if about else {}
    return environment.get_template("page.html").render(
        title=short_name(named),
        facts=facts(source, about, step),
        outcome=outcome(run, step),
        router=about.router if about else source.model.config.router,
        steered=about.steered if about else False,
        **sizes,
        chunk=CHUNK,
        routing=routing,
        guesses=guesses_of(record) if record else [],
        effects=effects,
        inactive_below=inactive_below(about.experts, about.k) if about else 0,
        pictures=_pictures(source, step, record, routing),
        content=script_json(_content(record, routing, texts, effects)),
    )


def percent(share: float) -> str:
    """A share in percent with two significant digits; 100 for everything."""
    value = 100 * share
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def _content(
    record: RoutingRecord | None, routing: RoutingSummary | None, texts: list[Excerpt], effects: dict[str, Any] | None
) -> dict[str, Any]:
    if record is None or routing is None:
        return {}
    return experts_of(record) | {
        "effect": effects,
        "gatesKnown": record.about.gates,
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


def _pictures(
    source: Source | None, step: int | None, record: RoutingRecord | None, routing: RoutingSummary | None
) -> dict[str, str]:
    """Those figures that the run and the record have data for, as data URLs, by name."""
    drawn: dict[str, Figure] = {}
    if record is not None and routing is not None:
        if routing.figures.frequency_correlation is not None:
            points = {record.about.router: (routing.count_U, routing.active_U)}
            drawn["frequency"] = routing_figures.active_against_frequency(points)
        drawn["domains"] = routing_figures.routed_share_by_domain(routing.share_CLE, routing.domains, record.about.k)
    if source is not None and (records := training_records(source.run, step)):
        drawn |= _of_training(records, source.model.config)
    return {name: _image(figure) for name, figure in drawn.items()}


def _of_training(records: list[dict], c: RemoeConfig) -> dict[str, Figure]:
    experts, active, few = c.experts_per_layer, c.active_per_token, thinned(records)
    losses = ([record["step"] for record in few], [record["lm_loss"] for record in few])
    drawn = {"loss": figures.training_losses({c.router: losses}, window=LOSS_WINDOW)}
    if c.steered:
        target = 1 - active / experts
        drawn["course"] = figures.training_course({c.router: few}, target)
        drawn["course-log"] = figures.training_course({c.router: few}, target, log_steps=True)
    if c.routes_pairs:
        steps, loads = zip(*((record["step"], record["load_per_expert"]) for record in records), strict=True)
        drawn["load"] = routing_figures.load_course(steps, loads, active)
    if flips := [(record["step"], record["flip_rate"]) for record in records if "flip_rate" in record]:
        drawn["flips"] = routing_figures.flips({c.router: tuple(zip(*flips, strict=True))}, {c.router: experts})
    return drawn


def _image(figure: Figure) -> str:
    svg = io.BytesIO()
    figures.write_svg(figure, svg)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
