"""TRL's `SFTTrainer`, whose loss has a head of its own: statistics, penalty and gradients are the model's own."""

import pytest
import torch
from tiny_models import build, token_ids
from transformers import Trainer, TrainerCallback, TrainingArguments

import remoe
from remoe.errors import ConfigError

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from tiny_sft import BATCH, SETTINGS, STEPS, arguments, collate, remoe_model, rows, tokenizer


def relufied_model(name):
    model = build(name)
    remoe.relufy(model, [token_ids()], max_loss_increase=None)
    return model


MODELS = {
    "relu": lambda: remoe_model("relu"),
    "relu_norm": lambda: remoe_model("relu_norm"),
    "topk": lambda: remoe_model("topk"),
    "mixtral": lambda: relufied_model("mixtral"),
    "qwen3_moe": lambda: relufied_model("qwen3_moe"),
}


def plain(model, folder, **options):
    args = TrainingArguments(output_dir=str(folder), **SETTINGS | options)
    callback = remoe.SparsityCallback()
    trainer = Trainer(model, args, train_dataset=rows(), data_collator=collate, callbacks=[callback])
    trainer.train()
    return trainer


def supervised(model, folder, callbacks=(), **options):
    trainer = trl.SFTTrainer(
        model,
        arguments(folder, **options),
        train_dataset=datasets.Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows()]),
        processing_class=tokenizer(),
        data_collator=collate,
        callbacks=[remoe.SparsityCallback(), *callbacks],
    )
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_under_the_plain_trainer(name, accumulate, tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.1}  # Adam makes a difference in the last bit one of the step's size
    options |= {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": BATCH // accumulate}
    one, two = MODELS[name](), MODELS[name]()
    expected, found = plain(one, tmp_path, **options), supervised(two, tmp_path, **options)
    for figure in ("loss", "sparsity", "lambda", "load_max_over_mean"):
        assert logged(found, figure) == pytest.approx(logged(expected, figure), rel=1e-4, abs=1e-7), figure
    for (key, weight), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["relu", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_callback_may_generate_in_between(name, tmp_path):
    class Writes(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            written.append(model.eval().generate(token_ids(1), max_new_tokens=2, eos_token_id=None, pad_token_id=0))
            model.train()

    one, two, written = MODELS[name](), MODELS[name](), []
    expected, found = supervised(one, tmp_path), supervised(two, tmp_path, callbacks=[Writes()])
    assert [len(ids[0]) for ids in written] == [len(token_ids(1)[0]) + 2] * STEPS
    assert logged(found, "lambda") == logged(expected, "lambda")
    assert logged(found, "loss") == logged(expected, "loss")


@pytest.mark.parametrize("name", ["relu", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_eval_loss_has_no_penalty(name, tmp_path):
    model = MODELS[name]()
    trainer = supervised(model, tmp_path, max_steps=1)
    model.sparsity.lam.fill_(1.0)
    batch = collate(rows()[:BATCH])
    model.eval()
    with torch.no_grad():
        expected = trainer.compute_loss(model, dict(batch))
        model.sparsity.lam.fill_(0.0)
        assert trainer.compute_loss(model, dict(batch)) == expected


@pytest.mark.parametrize("name", ["relu", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_recomputation_counts_once(name, tmp_path):
    one, two = MODELS[name](), MODELS[name]()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    expected, found = supervised(one, tmp_path), supervised(two, tmp_path, **options)
    for figure in ("loss", "sparsity", "lambda"):
        assert logged(found, figure) == pytest.approx(logged(expected, figure), rel=1e-4), figure


@pytest.mark.parametrize("name", ["relu", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_loss_that_would_weight_the_penalty_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="loss_type='dft'"):
        supervised(MODELS[name](), tmp_path, loss_type="dft")


@pytest.mark.parametrize("name", ["relu", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_adapters_are_trained_with_the_penalty(name, tmp_path):
    peft = pytest.importorskip("peft")
    runs = []
    for trainer in (plain, supervised):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["router", "gate"])
        torch.manual_seed(0)
        runs.append(trainer(peft.get_peft_model(MODELS[name](), config), tmp_path))
    for figure in ("loss", "grad_norm", "sparsity", "lambda"):
        assert logged(runs[1], figure) == pytest.approx(logged(runs[0], figure), rel=1e-3), figure
