"""The page of a comparison: the same text in several models, their measures and their training side by side."""

import tempfile
from pathlib import Path
from typing import Any

import remoe
from remoe.errors import CheckpointError, ConfigError
from remoe.lab.analysis.record import is_record
from remoe.lab.outputs import write_output
from remoe.lab.report.page import checked_place, environment, script_json
from remoe.lab.report.several.aligned import align
from remoe.lab.report.several.excerpts import excerpts_of
from remoe.lab.report.several.measures import Measured, experts_of, layers_of, measure, table_of
from remoe.lab.report.several.models import Compared, read_all, run_at
from remoe.lab.report.several.training import Training
from remoe.lab.text import short_name

MOST_MODELS = 6  # as many as there are colours of curves
SECTIONS = {"measures": "Measures", "text": "Text", "experts": "Experts", "layers": "Layers", "training": "Training"}
SCRIPTS = (
    "js/core", "js/heatmap", "js/lines", "js/scroller", "js/search", "several/js/shared", "several/js/measures",
    "several/js/text", "several/js/experts", "several/js/curves",
)  # fmt: skip


def write_comparison(
    paths: list[str],
    data: str | None,
    out: Path | None,
    *,
    max_tokens: int,
    excerpt_tokens: int,
    prompt: str | None = None,
) -> Path:
    """Reads one text with several models, or their records of it, and writes a page about the differences.

    Args:
        paths: two to `MOST_MODELS`, each as of `write_report`; the first is the reference.
        data: folder of prepared data, or raw text; None for the data of the first run among the models.
        out: the file to write; by default report-with-NAMES.html in the folder of the first model, or beside a record.
        max_tokens: approximate number of tokens to measure on.
        excerpt_tokens: number of tokens of each domain to show as text.
        prompt: text to read instead of data.

    Returns:
        The file.

    Raises:
        CheckpointError, ConfigError: as of `write_report`; ConfigError also for a wrong number of models.
        DataError: if the models read different texts, or the page cannot be written.
    """
    if not 2 <= len(paths) <= MOST_MODELS:
        raise ConfigError(f"a comparison has 2 to {MOST_MODELS} models, not {len(paths)}")
    for path in paths:  # before the work of the others
        if not Path(path).exists():
            raise CheckpointError(f"{path} does not exist")
    place = checked_place(out, _place(paths))
    with tempfile.TemporaryDirectory() as folder:
        models = read_all(paths, data, prompt, max_tokens=max_tokens, folder=Path(folder))
        data_of_page = comparison_data(models, excerpt_tokens)
    write_output(place, render(data_of_page).encode())
    return place


def comparison_data(models: list[Compared], excerpt_tokens: int) -> dict[str, Any]:
    """Everything that the page shows.

    Returns:
        head, always, with the models; measures, rows of a table; text, experts and layers if at least two models have
        routing, each with those models alone, whose numbers are in head.routed; training if a model was trained in a
        run, for each model or None.
    """
    routed = [number for number, model in enumerate(models) if model.record is not None]
    aligned = align([models[number] for number in routed]) if len(routed) > 1 else None
    measured: list[Measured | None] = [model.record and measure(model.record) for model in models]
    data: dict[str, Any] = {
        "head": {
            "title": " and ".join(model.name for model in models),
            "version": remoe.__version__,
            "models": [_head(model) for model in models],
            "routed": routed,
            "aligned": None if aligned is None else "tokens" if aligned.tokens else "characters",
        },
        "measures": table_of(models, measured, aligned),
    }
    if aligned is not None:
        records = [models[number].record for number in routed]
        found = [measured[number] for number in routed]
        data["text"] = excerpts_of(records, aligned, excerpt_tokens)
        data["experts"] = {
            "domains": [short_name(domain) for domain in aligned.domains],
            "models": [experts_of(one, record, aligned.domains) for one, record in zip(found, records, strict=True)],
        }
        data["layers"] = [layers_of(one, record.about.experts) for one, record in zip(found, records, strict=True)]
    if any(model.training for model in models):
        data["training"] = [model.training and _training(model.training) for model in models]
    return data


def render(data: dict[str, Any]) -> str:
    """The page that shows the data of `comparison_data`."""
    head = data["head"]
    facts = list(dict.fromkeys(name for model in head["models"] for name in model["facts"]))
    return (
        environment()
        .get_template("several/page.html")
        .render(
            head=head,
            facts=facts,
            sections={name: title for name, title in SECTIONS.items() if data.get(name)},
            scripts=SCRIPTS,
            content=script_json(data),
        )
    )


def _head(model: Compared) -> dict[str, Any]:
    about = model.record and model.record.about
    found = {"name": model.name, "router": model.router, "facts": model.facts, "outcome": model.outcome}
    return found | ({"layers": about.layers, "experts": about.experts, "k": about.k} if about else {})


def _training(training: Training) -> dict[str, Any]:
    return {"plots": training.plots, "target": training.target, "tokensPerStep": training.tokens_per_step}


def _place(paths: list[str]) -> Path:
    first, *others = map(Path, paths)
    names = "-".join(_plain(path) for path in others)[:100]
    if is_record(first):
        return first.with_name(f"{first.stem}-with-{names}.html")
    run = run_at(paths[0])
    return (run.path if run else first) / f"report-with-{names}.html"


def _plain(path: Path) -> str:
    """The last part of a path, for the name of a file."""
    name = path.resolve().name
    name = name.removesuffix(path.suffix) if is_record(path) else name
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
