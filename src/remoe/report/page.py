"""The report of a trained model: one HTML file that needs nothing else, to be opened, sent or kept.

`page.html`, `page.css` and `page.js` beside this file are put together with the numbers of one model. Text is coloured,
and experts are chosen, in the browser; what it needs for that lies in the page as JSON.

Legend: L layers, T tokens, E experts.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from remoe.analysis import figures, routing_figures
from remoe.analysis.collect import collect, gates_of
from remoe.analysis.measures import inactive_below
from remoe.analysis.summary import CHUNK, RoutingSummary, routing_of
from remoe.data import ValidationWindows
from remoe.data.files import atomic_write
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.plan import plan
from remoe.routing import ROUTERS
from remoe.training.checkpoint import checkpoint_step
from remoe.training.evaluate_run import Trained, open_trained
from remoe.training.metrics import read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS_WINDOW = 20  # records of a moving mean
POINTS = 600
GATE_DIGITS = 3


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a domain's validation text, and how it was routed.

    Attributes:
        domain: its name.
        tokens: the text, token by token.
        gates: of each layer and token the experts that it was given to: expert, gate, expert, gate, ...
    """

    domain: str
    tokens: list[str]
    gates: list[list[list[float]]]


def write_report(path: str, data: str | None, out: Path | None, *, max_tokens: int, excerpt_tokens: int) -> Path:
    """Runs a trained model over validation text, and writes a page about its routing.

    Args:
        path: a run's folder, one of its checkpoints, or the folder of a saved or exported model of ours.
        data: prepared data; None for the data that the run was trained with.
        out: the file; by default report.html in that folder.
        max_tokens: validation tokens that the numbers are taken over, shared out over the domains.
        excerpt_tokens: tokens of each domain that are shown as text.

    Returns:
        The file.

    Raises:
        CheckpointError: when there is no usable model, or its data is not known.
        DataError: when the data was made with another tokenizer.
    """
    trained = open_trained(path, data)
    windows = trained.windows("validation")
    c = trained.model.config
    routing, excerpts = None, []
    if c.routes_pairs:
        record = collect(trained.model, windows, max_tokens, batch_size=32)
        routing = routing_of(record, _wanted(c), lambda token: trained.tokenizer.decode([token]))
        excerpts = _excerpts(trained, windows, excerpt_tokens)
    out = out or (trained.run.path if trained.run else Path(path)) / "report.html"
    atomic_write(out, _page(trained, routing, excerpts).encode())
    return out


def _experts(config: RemoeConfig) -> int:
    return config.num_experts * config.granularity


def _wanted(config: RemoeConfig) -> int:
    return config.num_experts_per_tok * config.granularity


def _excerpts(trained: Trained, windows: ValidationWindows, length: int) -> list[Excerpt]:
    excerpts = []
    for domain in windows.domains:
        input_BS, _, mask_BS = next(windows.batches(domain, 1))
        input_BS, mask_BS = input_BS[:1, :length], mask_BS[:1, :length]
        gates = []
        for gate_TE in gates_of(trained.model, input_BS, mask_BS):
            active_TE = [gate_E.nonzero().flatten().tolist() for gate_E in gate_TE]
            gates.append(
                [
                    [number for expert in active_E for number in (expert, _short(gate_E[expert].item()))]
                    for active_E, gate_E in zip(active_TE, gate_TE, strict=True)
                ]
            )
        excerpts.append(Excerpt(domain, texts_of(trained.tokenizer, input_BS[mask_BS].tolist()), gates))
    return excerpts


def texts_of(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character of several tokens stands at the last of them."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids) and end - start < 8:
            texts.append("")
            continue
        texts.append(text)
        start = end
    return texts


def _short(gate: float) -> float:
    return float(f"{gate:.{GATE_DIGITS}g}")


def _page(trained: Trained, routing: RoutingSummary | None, excerpts: list[Excerpt]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("remoe.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["source"] = lambda name: Markup(environment.loader.get_source(environment, name)[0])
    c = trained.model.config
    return environment.get_template("page.html").render(
        title=trained.run.path.resolve().name if trained.run else trained.checkpoint.resolve().name,
        facts=_facts(trained),
        router=c.router,
        steered=ROUTERS[c.router].steered,
        experts=_experts(c),
        wanted=_wanted(c),
        chunk=CHUNK,
        routing=routing,
        little=inactive_below(_experts(c), _wanted(c)),
        pictures=_pictures(trained, routing),
        content=_json(_content(trained, routing, excerpts)),
    )


def _content(trained: Trained, routing: RoutingSummary | None, excerpts: list[Excerpt]) -> dict[str, Any]:
    if routing is None:
        return {}
    return {
        "share": routing.share_LE,
        "domains": routing.domains,
        "domainShare": routing.share_CLE,
        "top": routing.top_tokens,
        "excerpts": [vars(excerpt) for excerpt in excerpts],
    }


def _json(content: dict[str, Any]) -> Markup:
    """JSON that ends no script element, whatever the text in it."""
    return Markup(json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"))


def _facts(trained: Trained) -> dict[str, str]:
    """What the model is and how it did, by name."""
    c, run = trained.model.config, trained.run
    size = plan(c, c.max_position_embeddings, 1)
    facts = {
        "router": c.router,
        "experts": f"{_experts(c)} in each of {c.num_hidden_layers} layers, {_wanted(c)} wanted per token",
        "parameters": f"{_quantity(size.total_parameters)}, {_quantity(size.active_parameters)} of them for a token",
    }
    if run is not None:
        config, step = run.load_config(), checkpoint_step(trained.checkpoint)
        facts["trained"] = f"{step:,} steps of {config.batch_size * config.seq_len:,} tokens"
        summary = json.loads(run.summary.read_text()) if run.summary.is_file() else {}
        if summary.get("steps") == step:
            facts["validation loss"] = f"{summary['validation_loss']:.4f} nats per token"
            if ROUTERS[c.router].steered:
                facts["sparsity"] = f"{summary['final_sparsity']:.4f}, wanted {summary['target_sparsity']:g}"
    return facts


def _quantity(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _pictures(trained: Trained, routing: RoutingSummary | None) -> dict[str, str]:
    """Figures as addresses of images, by name; those that the run and the model allow."""
    c = trained.model.config
    experts, wanted = _experts(c), _wanted(c)
    drawn: dict[str, Figure] = {}
    if routing is not None:
        if routing.count_U:
            points = {c.router: (routing.count_U, routing.active_U)}
            drawn["frequency"] = routing_figures.active_against_frequency(points)
        drawn["domains"] = routing_figures.routed_share_by_domain(routing.share_CLE, routing.domains, wanted)
    if records := _records(trained):
        few = _thinned(records)
        losses = ([record["step"] for record in few], [record["lm_loss"] for record in few])
        drawn["loss"] = figures.training_losses({c.router: losses}, window=LOSS_WINDOW)
        if ROUTERS[c.router].steered:
            target = 1 - wanted / experts
            drawn["course"] = figures.training_course({c.router: few}, target)
            drawn["course-log"] = figures.training_course({c.router: few}, target, log_steps=True)
        if c.routes_pairs:
            steps, loads = zip(*((record["step"], record["load_per_expert"]) for record in records), strict=True)
            drawn["load"] = routing_figures.load_course(steps, loads, wanted)
        if flips := [(record["step"], record["flip_rate"]) for record in records if "flip_rate" in record]:
            drawn["flips"] = routing_figures.flips({c.router: tuple(zip(*flips, strict=True))}, {c.router: experts})
    return {name: _image(figure) for name, figure in drawn.items()}


def _records(trained: Trained) -> list[dict]:
    """Those of the run's metrics.jsonl up to the checkpoint."""
    if trained.run is None:
        return []
    step = checkpoint_step(trained.checkpoint)
    return [record for record in read_metrics(trained.run.metrics) if record["step"] <= step]


def _thinned(records: list[dict]) -> list[dict]:
    """At most about 2 POINTS of them, evenly and, for logarithmic steps, by even ratios: a figure shows no more."""
    if len(records) <= 2 * POINTS:
        return records
    even = np.linspace(0, len(records) - 1, POINTS)
    ratio = np.geomspace(1, len(records), POINTS) - 1
    return [records[i] for i in np.unique(np.concatenate([even, ratio]).round().astype(int))]


def _image(figure: Figure) -> str:
    svg = io.BytesIO()
    figures.write_svg(figure, svg)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
