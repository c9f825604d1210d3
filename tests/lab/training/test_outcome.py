"""What is said of a run at its end: the same numbers as in its other files, and the advice that goes with them."""

import pytest
import torch

import remoe
from remoe.lab.analysis.measures import routed_share
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.recording import record_routing
from remoe.lab.analysis.texts import PreparedText
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.outcome import experts_in_use, outcome
from remoe.lab.training.validate import evaluate, total

SETTLED = {
    "settling_step": 271, "sparse_step": 42, "sparsity_mean": 0.87389, "sparsity_deviation": 0.00371,
    "target_sparsity": 0.875, "final_sparsity": 0.8702,
}  # fmt: skip
UNSETTLED = SETTLED | {"settling_step": None, "sparsity_mean": None, "sparsity_deviation": None}


def said(options=(), **figures):
    config = config_from_dict(dict(options), "test")
    sizes = {"num_experts": config.num_experts, "num_experts_per_tok": config.k, "router": config.router}
    return outcome(config, remoe.RemoeConfig(**sizes, sparsity=vars(config.sparsity).copy()), figures)


def test_a_run_that_went_well():
    assert said(**SETTLED, experts=32, inactive_experts_per_layer=[0, 0, 0, 0]) == [
        "Sparsity settled at step 271: since then mean 0.8739, deviation 0.0037, target 0.875.",
        "All 32 experts are in use (4 layers of 8).",
    ]


def test_unused_experts_and_closed_layers_are_counted():
    sentences = said(**SETTLED, experts=32, inactive_experts_per_layer=[0, 5, 1, 0])
    assert sentences[1].startswith("26 of 32 experts are in use (4 layers of 8): the others have less than an eighth ")
    assert len(sentences) == 2
    one = said(**SETTLED, experts=32, inactive_experts_per_layer=[0, 1, 0, 0])[1]
    assert one.endswith(": the other has less than an eighth of its share of the validation tokens.")
    sentences = said(**SETTLED, experts=32, inactive_experts_per_layer=[8, 8, 3, 0])
    assert sentences[1].startswith("13 of 32 experts are in use")
    assert sentences[2] == "Layers 0, 1 hardly use any expert."
    assert "--num-experts 4" in sentences[3]
    assert said(**SETTLED, experts=8, inactive_experts_per_layer=[8])[2] == "Layer 0 hardly uses any expert."
    few = said({"num_experts": 2}, **SETTLED, experts=8, inactive_experts_per_layer=[1, 1, 1, 2])
    assert not any("--num-experts" in sentence for sentence in few)  # half of two is a dense model


def test_sparsity_that_did_not_settle_asks_for_more_steps():
    sentences = said({"steps": 500}, **UNSETTLED)
    assert sentences[0] == "Sparsity has not settled: 0.8702 at the last step, target 0.875."
    assert sentences[1].endswith("a new run with --steps 1000.")
    assert said({"steps": 3}, **UNSETTLED)[1].endswith("--steps 200.")  # at least 50 steps count as settled
    sentences = said({"sparsity": {"rule": "sign"}}, **UNSETTLED | {"sparse_step": None})
    assert sentences[0].endswith("; the sparse stage was not reached.")
    assert "--sparsity.rule smooth" in sentences[1]


@pytest.mark.parametrize("options", [{"router": "topk"}, {"router": "dense"}, {"sparsity": {"rule": "none"}}])
def test_where_lambda_controls_nothing_no_sparsity_is_judged(options):
    assert said(options, **UNSETTLED) == []


def test_an_evaluation_counts_the_tokens_of_every_expert(corpus):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, vocab_size=512, num_experts=4))
    with torch.no_grad():
        model.model.layers[1].mlp.router.weight[2:] = 0
    windows = ValidationWindows(open_dataset(corpus).validation, 32)
    results = evaluate(model, windows, batch_size=8)
    record = record_routing(Mixture(model), PreparedText(windows, None)).whole()
    expected = routed_share(record.active_LTE)
    torch.testing.assert_close(total(results).share_LE, expected.double())
    assert total(results).sparsity == pytest.approx(1 - expected.mean().item())
    assert experts_in_use(model.config, total(results)) == {"experts": 8, "inactive_experts_per_layer": [0, 2]}
    dense = remoe.RemoeConfig(**sizes, router="dense")
    assert experts_in_use(dense, total(results)) == {}
