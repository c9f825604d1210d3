"""What the card of an exported model says of the model and its data."""

import pytest

import remoe
from remoe.lab.export.card import _data_name, _what


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "dense"}, "A dense language model (router `dense`). Trained"),
        ({"router": "lory", "num_experts_per_tok": 1}, "8 experts, merged into one for each segment"),
        (
            {"router": "topk", "shared_expert_size": 8},
            "every token also has a shared expert of width 8.",
        ),
    ],
)
def test_the_cards_sentence_is_of_the_model(options, words):
    assert words in _what(remoe.RemoeConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **options))


def test_the_card_names_the_data_without_its_place():
    assert _data_name("/home/me/texts-bpe4096") == "texts-bpe4096"
    assert _data_name("data/stdlib-3.11.7-bpe4096") == "stdlib-3.11.7-bpe4096: Python's standard library"
