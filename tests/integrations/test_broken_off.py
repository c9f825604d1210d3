"""Training that was broken off and begun again, second rounds, and models given by their paths."""

import json

import pytest
import torch
from tiny_models import VOCAB, build, token_ids
from transformers import Trainer, TrainerCallback

import remoe
from remoe.errors import ConfigError

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from tiny_sft import SETTINGS, collate, remoe_model, rows, tokenizer
from tiny_sft import arguments as sft_arguments
from tiny_trainer import arguments, tiny
from tiny_trainer import rows as plain_rows

pytestmark = pytest.mark.slow


class Break(TrainerCallback):
    """Ctrl-C in the second micro-batch of the first step."""

    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def supervised(model, folder, **options):
    return trl.SFTTrainer(
        model,
        sft_arguments(folder, **options),
        train_dataset=datasets.Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows()]),
        processing_class=tokenizer(),
        data_collator=collate,
        callbacks=[remoe.SparsityCallback()],
    )


def broken_off(trainer, times=2):
    for _ in range(times):
        trainer.add_callback(Break)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.pop_callback(Break)


def logged(trainer):
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return [entry[name] for name in ("loss", "grad_norm", "sparsity", "lambda")]


STEP = {"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("bf16", [False, True])
def test_sft_begun_again_has_the_penalty_once(bf16, tmp_path):
    options = STEP | {"bf16": bf16}
    whole = supervised(remoe_model("relu"), tmp_path, **options)
    whole.train()
    model = remoe_model("relu")
    again = supervised(model, tmp_path, **options)
    broken_off(again)
    again.train()
    assert logged(again) == logged(whole)
    assert not [name for name in vars(model) if "penalised" in name]


def test_statistics_of_a_broken_off_step_are_forgotten(tmp_path):
    whole, again = (
        Trainer(tiny(), arguments(tmp_path, **STEP), train_dataset=plain_rows(), callbacks=[remoe.SparsityCallback()])
        for _ in range(2)
    )
    whole.train()
    broken_off(again)
    assert again.model.sparsity._tokens_L.any()
    again.train()
    assert logged(again) == logged(whole)


def test_a_smaller_batch_after_one_without_memory_starts_from_nothing(tmp_path):
    class Full(Trainer):
        full = True

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            if self.full:
                self.full = False
                raise RuntimeError("CUDA out of memory.")
            return loss

    callback = remoe.SparsityCallback()
    options = {"auto_find_batch_size": True, "max_steps": 1, "logging_steps": 1}
    trainer = Full(tiny(), arguments(tmp_path, **options), train_dataset=plain_rows(), callbacks=[callback])
    seen = []
    update = trainer.model.update_routing
    trainer.model.update_routing = lambda *args, **options: (
        seen.append(trainer.model.sparsity._passes.item()),
        update(*args, **options),
    )
    trainer.train()
    assert seen == [1]


def test_a_second_round_and_one_from_a_checkpoint_train(tmp_path):
    model = remoe_model("topk")
    for _ in range(2):
        supervised(model, tmp_path, max_steps=1).train()
        assert not hasattr(model.config, "output_router_logits")
        assert model.config.router_aux_loss_coef == 0.01
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    assert "auto_map" not in values
    config.write_text(json.dumps(values | {"output_router_logits": True}))  # as a version before wrote it
    trainer = supervised(str(tmp_path / "model"), tmp_path, max_steps=1)
    trainer.train()
    assert type(trainer.model) is remoe.RemoeForCausalLM
    assert len(logged(trainer)) == 4


@pytest.mark.parametrize("name", ["topk", "mixtral"])
def test_another_coefficient_of_trl_is_refused_and_undone(name, tmp_path):
    model = remoe_model(name) if name == "topk" else build(name)
    if name == "mixtral":
        remoe.relufy(model, [token_ids()], max_loss_increase=None)
    own = model.config.router_aux_loss_coef
    trainer = supervised(model, tmp_path, max_steps=1, router_aux_loss_coef=0.0 if name == "topk" else 0.5)
    with pytest.raises(ConfigError, match="leave it out of SFTConfig"):
        trainer.train()
    assert model.config.router_aux_loss_coef == own


def test_dpo_takes_a_path_and_says_that_it_has_no_penalty(tmp_path):
    remoe_model("relu").save_pretrained(tmp_path / "model")
    settings = SETTINGS | {"max_steps": 1, "per_device_train_batch_size": 2, "output_dir": str(tmp_path)}
    del settings["remove_unused_columns"]
    pairs = datasets.Dataset.from_list([{"prompt": "w4 w5", "chosen": "w6 w7", "rejected": "w8"}] * 2)
    options = {"args": trl.DPOConfig(**settings), "train_dataset": pairs, "processing_class": tokenizer()}
    trainer = trl.DPOTrainer(str(tmp_path / "model"), **options)
    trainer.train()
    assert type(trainer.model) is type(trainer.ref_model) is remoe.RemoeForCausalLM
    trainer.add_callback(remoe.SparsityCallback)
    with pytest.raises(ConfigError, match="loss is not that of RemoeForCausalLM"):
        trainer.train()


def test_ids_without_a_token_are_not_in_the_loss_of_trl(tmp_path):
    first = remoe_model("relu")
    cut = remoe.RemoeConfig(**first.config.to_diff_dict() | {"vocab_size": VOCAB + 64, "tokenizer_size": VOCAB})
    rounded = remoe.RemoeForCausalLM(cut)
    state, big = first.state_dict(), rounded.state_dict()
    for key, weight in state.items():
        big[key][: len(weight)].copy_(weight) if weight.ndim else big[key].copy_(weight)
    with torch.no_grad():
        rounded.lm_head.weight[VOCAB:] *= 100  # they would win
    found = []
    for model in (first, rounded):
        trainer = supervised(model, tmp_path, max_steps=1, logging_steps=1)
        trainer.train()
        found.append(logged(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert rounded.get_output_embeddings() is rounded.lm_head
