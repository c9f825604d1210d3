"""The YAML header of a model card, by which the Hugging Face Hub lists and compares models."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from remoe.errors import DataError, check
from remoe.lab.data.manifest import MANIFEST_NAME, read_manifest
from remoe.models.configuration_remoe import RemoeConfig

# Columns of an evaluation, under the names that the card's table gives them.
_METRICS = {"loss": "loss, nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_licence(licence: str) -> None:
    """Raises ConfigError for what cannot be an identifier of a licence on the Hub, such as apache-2.0."""
    written = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence)
    check(written is not None, f"the license must be an identifier of the Hub such as apache-2.0, but is {licence!r}")


def header(
    c: RemoeConfig,
    name: str,
    data: str,
    validation: dict[str, dict[str, float]],
    licence: str | None = None,
    library: str = "transformers",
) -> str:
    """The header's lines, without the separators.

    Args:
        c: configuration of the model.
        name: of the model.
        data: folder of the prepared dataset; it may be gone, then the datasets are not known.
        validation: losses (nats per token), perplexities and bits per byte by domain; empty if not known. A domain
            without one of the figures, or with one that is not finite, is listed without it.
        licence: identifier of the model's licence on the Hub.
        library: that loads the model.
    """
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    fields["tags"] = ["moe", "remoe"] if c.routes_pairs else ["remoe"]
    if licence is not None:
        fields["license"] = licence
    if datasets := _datasets(Path(data)):
        fields["datasets"] = datasets
    if results := _results(Path(data).name, validation):
        fields["model-index"] = [{"name": name, "results": results}]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _datasets(data: Path) -> list[str]:
    """The Hub's datasets among the sources of a prepared dataset, each once."""
    if not (data / MANIFEST_NAME).is_file():
        return []
    try:
        sources = read_manifest(data).sources
    except DataError:  # changed since the training: what it says of its sources may not hold for the model
        return []
    names = [source.removeprefix("hf:").partition(":")[0] for source in sources if source.startswith("hf:")]
    return list(dict.fromkeys(name for name in names if _HUB_NAME.fullmatch(name) and not Path(name).exists()))


def _results(dataset: str, validation: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The evaluation of each domain, in the Hub's format."""
    results = []
    for domain, row in validation.items():
        metrics = [
            {"type": metric, "value": row[metric], "name": f"validation {title}"}
            for metric, title in _METRICS.items()
            if metric in row and math.isfinite(row[metric])
        ]
        if metrics:
            of = {"name": dataset, "type": dataset, "config": domain, "split": "validation"}
            results.append({"task": {"type": "text-generation"}, "dataset": of, "metrics": metrics})
    return results
