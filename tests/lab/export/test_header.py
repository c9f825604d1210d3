"""The header of a model card holds what the Hub reads: license, datasets, and the evaluation in its format."""

import json
import math

import pytest
from huggingface_hub import ModelCard

import remoe
from remoe.errors import ConfigError
from remoe.lab.data.manifest import read_manifest
from remoe.lab.export.header import check_licence, header

CONFIG = remoe.RemoeConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)


def card(*args):
    return ModelCard(f"---\n{header(CONFIG, *args)}---\n# A model\n").data


def test_the_evaluation_is_read_back_from_the_card():
    rows = {
        "all": {"loss": 2.5, "perplexity": math.exp(2.5), "bits_per_byte": 1.25, "sparsity": 0.75},
        "farm": {"loss": 2.0, "perplexity": math.inf},
    }
    data = card("My: model", "/nowhere/texts-bpe4096", rows, "apache-2.0")
    assert (data.license, data.datasets, data.model_name) == ("apache-2.0", None, "My: model")
    found = [
        (result.dataset_config, result.metric_type, result.metric_value, result.metric_name)
        for result in data.eval_results
    ]
    assert found == [
        ("all", "loss", 2.5, "validation loss, nats per token"),
        ("all", "perplexity", math.exp(2.5), "validation perplexity"),
        ("all", "bits_per_byte", 1.25, "validation bits per byte"),
        ("farm", "loss", 2.0, "validation loss, nats per token"),
    ]
    for result in data.eval_results:
        assert (result.task_type, result.dataset_name, result.dataset_split) == (
            "text-generation",
            "texts-bpe4096",
            "validation",
        )


def test_a_card_says_only_what_is_known():
    data = card("model", "/nowhere/texts", {})
    assert (data.license, data.datasets, data.eval_results) == (None, None, None)
    assert data.tags == ["moe", "remoe"]


def test_datasets_are_the_hubs_among_the_sources(corpus, tmp_path):
    sources = ["hf:owner/texts:en:train", "texts/", "hf:owner/texts:de", f"hf:{corpus}", "hf:wikitext", "stdlib"]
    content = read_manifest(corpus).model_copy(update={"sources": sources})
    (tmp_path / "dataset.json").write_bytes(content.to_bytes())
    assert card("model", str(tmp_path), {}).datasets == ["owner/texts", "wikitext"]
    altered = json.loads(content.to_bytes()) | {"vocab_size": 7}
    (tmp_path / "dataset.json").write_text(json.dumps(altered))
    assert card("model", str(tmp_path), {}).datasets is None


@pytest.mark.parametrize("name", ["", "Apache 2.0", "mit\nlicense: other"])
def test_a_license_that_is_no_identifier_is_refused(name):
    with pytest.raises(ConfigError, match="identifier of the Hub"):
        check_licence(name)
