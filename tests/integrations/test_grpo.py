"""TRL's log-probabilities, DPO's and GRPO's, come from the weights of the head: without rows that no token has."""

import copy
import math

import pytest
import torch
from tiny_models import VOCAB, token_ids

import remoe

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from tiny_sft import SETTINGS, remoe_model, tokenizer
from trl.trainer.utils import add_fused_lm_head


def rounded_up():
    """A model with as many ids that no token has as there are tokens, which would win."""
    config = remoe_model("relu").config
    config.vocab_size, config.tokenizer_size = 2 * VOCAB, VOCAB
    torch.manual_seed(0)
    model = remoe.RemoeForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 100
    return model


@torch.no_grad()
def test_log_probabilities_of_a_trimmed_model_are_those_of_its_logits():
    model, ids = rounded_up().eval(), token_ids(2)
    logits = model(ids).logits
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    trimmed = copy.deepcopy(model)
    trimmed.resize_token_embeddings(VOCAB)
    torch.testing.assert_close(trimmed(ids).logits, logits[..., :VOCAB])
    found = []
    for one in (model, trimmed):
        add_fused_lm_head(one)
        found.append(one(input_ids=ids, labels=ids, fused_lm_head=True).log_probs)
    torch.testing.assert_close(found[1], expected)
    assert (found[0] < found[1] - 10).any()  # TRL looks at the rows; if it no longer does, the documentation changes


@pytest.mark.slow
def test_grpo_trains_a_model_that_it_loads_from_a_path(tmp_path):
    model = rounded_up()
    model.resize_token_embeddings(VOCAB)
    model.save_pretrained(tmp_path / "model")
    settings = {key: value for key, value in SETTINGS.items() if key != "remove_unused_columns"}
    settings |= {"max_steps": 2, "num_generations": 4, "max_completion_length": 4, "output_dir": str(tmp_path)}
    prompts = datasets.Dataset.from_list([{"prompt": f"w{i}"} for i in range(4, 12)])
    written = []

    def reward(completions, completion_ids, **_):
        written.extend(completion_ids)
        return [float(ids[0] % 2) for ids in completion_ids]

    trainer = trl.GRPOTrainer(
        str(tmp_path / "model"), reward, trl.GRPOConfig(**settings), prompts, processing_class=tokenizer()
    )
    trainer.train()
    assert type(trainer.model) is remoe.RemoeForCausalLM
    entropies = [entry["entropy"] for entry in trainer.state.log_history if "entropy" in entry]
    assert len(entropies) == 2
    assert all(0 < entropy <= math.log(VOCAB) + 1e-4 for entropy in entropies)
    assert max(max(ids) for ids in written) < VOCAB
    assert not torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)
