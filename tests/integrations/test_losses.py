"""Which losses a trainer may have: those with the penalty in them, whatever the split of a batch."""

import pytest
import torch
from tiny_models import build, token_ids
from torch import nn

import remoe
from remoe.errors import ConfigError
from remoe.integrations.trainer import routed_module

pytest.importorskip("accelerate")

from tiny_trainer import BATCH, STEPS, TINY, arguments, logged, rows, tiny
from transformers import Trainer


def test_trainer_that_bypasses_the_forward_pass_is_refused(tmp_path):
    class Bypass(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            return model.lm_head(hidden).logsumexp(-1).mean()

    trainer = Bypass(tiny(), arguments(tmp_path), train_dataset=rows(), callbacks=[remoe.SparsityCallback()])
    with pytest.raises(ConfigError, match="loss is not that of RemoeForCausalLM"):
        trainer.train()


def no_penalty(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("relufied", [False, True])
@pytest.mark.parametrize("way", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_with_a_loss_of_its_own_is_refused(way, relufied, tmp_path):
    model = tiny()
    if relufied:
        model = build("mixtral")
        remoe.relufy(model, [token_ids()], max_loss_increase=None)
    options = {way: 0.1} if way == "label_smoothing_factor" else {}
    function = no_penalty if way == "compute_loss_func" else None
    callbacks = [remoe.SparsityCallback()]
    trainer = Trainer(
        model, arguments(tmp_path, **options), train_dataset=rows(), callbacks=callbacks, compute_loss_func=function
    )
    with pytest.raises(ConfigError, match=f"loss is not that of {type(model).__name__}"):
        trainer.train()


def test_a_look_at_the_loss_before_training_changes_nothing_about_that(tmp_path):
    model, callbacks = tiny().eval(), [remoe.SparsityCallback()]
    batch = rows()[0]["input_ids"][None]
    outputs = model(batch, labels=batch)
    assert model.sparsity.loss_terms(outputs.routings).total > 0
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=rows(), callbacks=callbacks)
    with pytest.raises(ConfigError, match="loss is not that of"):
        trainer.train()


@pytest.mark.parametrize("router", ["hash", "sigmoid", "threshold", "dense", "topk"])
def test_without_a_penalty_any_loss_will_do(router, tmp_path):
    model = tiny(router=router, router_aux_loss_coef=0.0)
    callbacks = [remoe.SparsityCallback()]
    Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=rows(), callbacks=callbacks).train()


def test_the_balance_loss_of_topk_is_a_penalty_too(tmp_path):
    model, callbacks = tiny(router="topk"), [remoe.SparsityCallback()]
    options = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="loss is not that of"):
        Trainer(model, options, train_dataset=rows(), callbacks=callbacks).train()


def test_a_loss_of_ones_own_with_the_penalty_in_it_is_taken(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
            penalty = routed_module(model).sparsity.loss_terms(outputs.routings).total
            return penalty / self.args.gradient_accumulation_steps

    norms = []
    for size in (BATCH, 1):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH // size}
        same = [row | {"attention_mask": torch.ones_like(row["attention_mask"])} for row in rows()]
        model = tiny(router_options={"load_balance": False})  # so that shares of a batch add up
        trainer = Own(model, arguments(tmp_path, **options), train_dataset=same, callbacks=[remoe.SparsityCallback()])
        trainer.train()
        assert len(set(logged(trainer, "lambda"))) == STEPS
        norms.append(logged(trainer, "grad_norm")[0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_classifier_has_one_loss_whatever_the_split_and_predicts_its_logits(tmp_path):
    data = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows())]
    losses, norms = [], []
    for size in (BATCH, 1):
        torch.manual_seed(0)
        config = remoe.RemoeConfig(**TINY, num_labels=3, pad_token_id=0, router_options={"load_balance": False})
        model = remoe.RemoeForSequenceClassification(config).train()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": BATCH // size, "max_steps": 1}
        trainer = Trainer(
            model, arguments(tmp_path, **options), train_dataset=data, callbacks=[remoe.SparsityCallback()]
        )
        trainer.train()
        losses += logged(trainer, "loss")
        norms += logged(trainer, "grad_norm")
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    assert trainer.predict(data).predictions.shape == (len(data), 3)
