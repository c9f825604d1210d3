"""The report of a trained model: a single HTML file that needs no other file and no network.

It combines `page.html` in `frame.html`, `page.css`, the scripts in `js/` and uPlot in `vendor/` with the data of
`page_data` as JSON.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from remoe.errors import ConfigError, DataError
from remoe.lab.analysis.record import RoutingRecord, is_record
from remoe.lab.analysis.source import Source, open_source
from remoe.lab.analysis.writing import write_text
from remoe.lab.generation import SamplingOptions
from remoe.lab.outputs import check_output, is_report, write_output
from remoe.lab.report.sections import page_data
from remoe.lab.training.checkpoint import saved_step

SECTIONS = {
    "generation": "Generation",
    "text": "Text",
    "experts": "Experts",
    "between": "Between layers",
    "dial": "Dial",
    "training": "Training",
}
SCRIPTS = (
    "js/core", "js/heatmap", "js/lines", "js/scroller", "js/search", "js/text", "js/experts", "js/between",
    "js/training", "js/generation", "js/dial",
)  # fmt: skip


def write_report(
    path: str,
    data: str | None,
    out: Path | None,
    *,
    max_tokens: int,
    excerpt_tokens: int,
    prompt: str | None = None,
    effect_tokens: int = 0,
    generation: SamplingOptions | None = None,
    dial_tokens: int = 0,
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
        generation: how the model continues the prompt, whose text and routing the page then shows; None for none.
        dial_tokens: number of tokens on which loss and speed are measured at several gate thresholds and caps; 0 for
            none.

    Returns:
        The file.

    Raises:
        CheckpointError: if there is no usable model, or its data is unknown.
        ConfigError: for a model without a mixture of experts, and for data or a prompt beside a record.
        DataError: if the data was made with another tokenizer, or the page cannot be written.
    """
    if is_record(path):
        if data is not None or prompt is not None or effect_tokens or dial_tokens:
            raise ConfigError(
                f"{path} is a record of a text that was read: --data, --prompt, --effect-tokens and --dial-tokens do "
                "not go with it"
            )
        record, place = RoutingRecord(Path(path)), checked_place(out, Path(path).with_suffix(".html"))
        write_output(place, render(page_data(None, None, record, excerpt_tokens=excerpt_tokens)).encode())
        return place
    source, written = open_source(path, data, prompt, max_tokens=max_tokens), None
    # Read first, because a run that is still training soon deletes the checkpoint.
    step = saved_step(source.checkpoint) if source.run else None
    place = checked_place(out, _place(source, Path(path), step))
    if generation is not None:
        source, written = write_text(source, prompt, generation)
    with tempfile.TemporaryDirectory() as folder:
        sink, record = Path(folder) / "record.parquet", None
        if source.mixture is not None:
            record = source.record(sink) if written is None else written.record(source, sink)
        data = page_data(
            source,
            step,
            record,
            excerpt_tokens=excerpt_tokens,
            effect_tokens=effect_tokens,
            written=written,
            dial_tokens=dial_tokens,
            token_text=lambda token: source.tokenizer.decode([token]),
        )
    write_output(place, render(data).encode())
    return place


def checked_place(out: Path | None, default: Path) -> Path:
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


def render(data: dict[str, Any]) -> str:
    """The page that shows the data of `page_data`."""
    return (
        environment()
        .get_template("page.html")
        .render(
            head=data["head"],
            sections={name: title for name, title in SECTIONS.items() if name in data},
            stages=data.get("training", {}).get("stages"),
            same=data.get("text", {}).get("same"),
            scripts=SCRIPTS,
            content=script_json(data),
        )
    )


def environment() -> jinja2.Environment:
    """Templates in this folder; `source(name)` is the text of a file in it."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("remoe.lab.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.globals["source"] = lambda name: Markup(made.loader.get_source(made, name)[0])
    return made


def script_json(content: dict[str, Any]) -> Markup:
    """JSON that cannot end the script element, whatever texts it contains."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
