"""SparsityCallback: once per step, whatever the trainer, the wrapper, the split of a batch, and over a resume."""

import copy
import json

import pytest
import torch
from ranks import run_ranks
from torch import nn

import remoe
from remoe.errors import ConfigError
from remoe.integrations.trainer import routed_module, routing_figures

pytest.importorskip("accelerate")

from tiny_trainer import BATCH, STEPS, arguments, logged, rows, tiny, train
from transformers import LlamaConfig, LlamaForCausalLM, Trainer


def count_updates(model, monkeypatch):
    module, calls = routed_module(model), []
    update = module.update_routing
    monkeypatch.setattr(module, "update_routing", lambda **k: (calls.append(k["lr_fraction"]), update(**k)))
    return calls


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lambda_moves_once_per_optimiser_step(tmp_path, monkeypatch, accumulate):
    model = tiny()
    calls = count_updates(model, monkeypatch)
    trainer = train(
        model, tmp_path, per_device_train_batch_size=BATCH // accumulate, gradient_accumulation_steps=accumulate
    )
    assert len(calls) == trainer.state.global_step == STEPS
    expected, value = [], 1e-3
    for sparsity in logged(trainer, "sparsity"):
        value *= 1.2 if sparsity < 0.75 else 1 / 1.2
        expected.append(value)
    assert logged(trainer, "lambda") == pytest.approx(expected, rel=1e-5)
    assert model.sparsity.lam.item() == pytest.approx(expected[-1], rel=1e-5)


@pytest.mark.parametrize("scheduler", ["linear", "constant", "cosine"])
def test_the_controller_gets_the_learning_rate_as_a_fraction_of_its_peak(tmp_path, monkeypatch, scheduler):
    model = tiny(sparsity={"rule": "smooth"})
    fractions = count_updates(model, monkeypatch)
    warmup = {} if scheduler == "constant" else {"warmup_steps": 2}
    train(model, tmp_path, lr_scheduler_type=scheduler, learning_rate=3e-3, max_steps=4, **warmup)
    after = {"linear": [1, 1 / 2], "constant": [1, 1], "cosine": [1, 1 / 2]}[scheduler]
    before = [1, 1] if scheduler == "constant" else [0, 1 / 2]
    assert fractions == pytest.approx(before + after)


def test_eval_loss_is_the_cross_entropy(tmp_path):
    model = tiny(sparsity={"lambda_init": 1.0})
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows(BATCH))
    found = trainer.evaluate()["eval_loss"]
    ids, mask, labels = (torch.stack([row[k] for row in rows(BATCH)]) for k in rows(1)[0])
    logits = model.eval()(ids, attention_mask=mask).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("normalization", ["paper", "official"])
def test_gradients_of_loss_and_penalty_do_not_depend_on_accumulation(tmp_path, normalization):
    # plain L1 is a sum over tokens; padding makes the micro-batches' shares differ
    weights = []
    for parts in (1, 2, 4):
        model = tiny(
            sparsity={"lambda_init": 0.3},
            router_options={"load_balance": False},
            regularizer_normalization=normalization,
        )
        train(
            model,
            tmp_path / str(parts),
            max_steps=1,
            per_device_train_batch_size=BATCH // parts,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
        )
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny().parameters()])
    assert (weights[0] - start).norm() > 0.1
    for other in weights[1:]:
        # the shares are by targets, the penalty by tokens: each row has one token without a target
        assert (other - weights[0]).norm() < 0.02 * (weights[0] - start).norm()


def test_log_reaches_reporters_before_it_when_attached(tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = Trainer(tiny(), arguments(tmp_path), train_dataset=rows(), callbacks=[Reporter()])
    remoe.SparsityCallback.attach(trainer)
    trainer.train()
    steps = [logs for logs in seen if "loss" in logs]
    assert len(steps) == STEPS
    for logs in steps:
        assert {"sparsity", "lambda", "load_max_over_mean"} <= logs.keys()
        assert logs["load_max_over_mean"] >= 1


def test_figures_by_hand():
    model = tiny()
    model.sparsity.load_LE.copy_(torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert routing_figures(model)["load_max_over_mean"] == pytest.approx(2.0)  # the layer without pairs left out


@pytest.mark.parametrize("precision", ["bf16", "recompute"])
def test_mixed_precision_and_recomputation_keep_lambda_float32(tmp_path, precision):
    options = {"bf16": True} if precision == "bf16" else {"gradient_checkpointing": True}
    trainer = train(tiny(), tmp_path, **options)
    reference = train(tiny(), tmp_path)
    assert trainer.model.sparsity.lam.dtype is torch.float32
    assert logged(trainer, "sparsity")[0] == pytest.approx(logged(reference, "sparsity")[0], abs=0.02)
    assert len(set(logged(trainer, "lambda"))) > 1


@pytest.mark.parametrize("router", ["relu", "sigmoid", "threshold"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, router):
    options = {"sparsity": {"rule": "smooth"}, "router": router}
    whole = train(tiny(**options), tmp_path / "whole", save_strategy="steps", save_steps=2)
    fresh = tiny(**options)
    resumed = train(
        fresh,
        tmp_path / "resumed",
        resume=str(tmp_path / "whole" / "checkpoint-2"),
        save_strategy="steps",
        save_steps=2,
    )
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    assert logged(resumed, "lambda") == logged(whole, "lambda")


def test_resumed_adapter_has_its_lambda(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        return peft.get_peft_model(
            tiny(sparsity={"rule": "smooth"}, router="sigmoid"), peft.LoraConfig(target_modules=["q_proj"], r=2)
        )

    whole = train(adapted(), tmp_path / "whole", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = train(adapted(), tmp_path / "resumed", resume=str(checkpoint), save_strategy="steps", save_steps=2)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["SparsityCallback"]
    assert {"sparsity.lam", "model.layers.0.mlp.router.bias_E"} <= saved["attributes"]["routing"].keys()


def test_checkpoint_of_a_run_without_the_callback_can_be_resumed(tmp_path):
    trainer = Trainer(
        tiny(), arguments(tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=2), train_dataset=rows()
    )
    trainer.train()
    resume = str(tmp_path / "a" / "checkpoint-2")
    trainer = train(tiny(), tmp_path / "b", resume=resume, save_strategy="steps", save_steps=2)
    assert len(logged(trainer, "loss")) == STEPS


def test_foreign_callback_state_is_refused(tmp_path):
    train(tiny(), tmp_path / "a", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["SparsityCallback"]["attributes"]["routing"]["sparsity.lam"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"lacks sparsity\.lam"):
        train(tiny(), tmp_path / "b", resume=str(checkpoint))


class Converted(nn.Module):
    """Any model: `sparsity` and `update_routing` are attached to it."""

    def __init__(self):
        super().__init__()
        self.inner = tiny()

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize("wrap", ["plain", "compiled", "peft", "attached"])
def test_finds_the_module_in_its_wrappers(wrap):
    model = tiny()
    if wrap == "compiled":
        wrapped = torch.compile(model)
    elif wrap == "peft":
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    elif wrap == "attached":
        wrapped = LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
        wrapped.sparsity, wrapped.update_routing, model = model.sparsity, model.update_routing, wrapped
    else:
        wrapped = model
    assert routed_module(wrapped) is model
    assert routed_module(nn.Sequential(wrapped)) is model


@pytest.mark.slow
def test_compiled_model_trains(tmp_path):
    trainer = train(tiny(), tmp_path, torch_compile=True, torch_compile_backend="eager")
    plain = train(tiny(), tmp_path)
    assert logged(trainer, "lambda") == pytest.approx(logged(plain, "lambda"))
    assert logged(trainer, "sparsity") == pytest.approx(logged(plain, "sparsity"), abs=0.01)


def test_model_without_routers_is_refused(tmp_path):
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no `sparsity` and `update_routing`"):
        train(dense, tmp_path)


def test_two_callbacks_are_refused(tmp_path):
    callbacks = [remoe.SparsityCallback(), remoe.SparsityCallback()]
    trainer = Trainer(tiny(), arguments(tmp_path), train_dataset=rows(), callbacks=callbacks)
    with pytest.raises(ConfigError, match="2 times a step"):
        trainer.train()


def test_documented_plain_loop_equals_the_trainer(tmp_path):
    model, data = tiny(router_options={"load_balance": False}), rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        batch = {k: torch.stack([row[k] for row in data[step * BATCH :][:BATCH]]) for k in data[0]}
        targets = (batch["labels"][:, 1:] != -100).sum()
        for half in (slice(0, 2), slice(2, 4)):
            part = {k: v[half] for k, v in batch.items()}
            model(**part, num_items_in_batch=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        routed_module(model).update_routing()

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(data)

    other = tiny(router_options={"load_balance": False})
    options = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = arguments(tmp_path, **options)
    InOrder(other, args, train_dataset=data, callbacks=[remoe.SparsityCallback()]).train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def _ddp(rank, folder, accumulate):
    options = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    trainer = train(
        tiny(router_options={"load_balance": False}),
        folder / f"rank{rank}",
        per_device_train_batch_size=BATCH // 2 // accumulate,
        gradient_accumulation_steps=accumulate,
        **options,
    )
    record = {"log": [logged(trainer, n) for n in ("lambda", "sparsity")], "lam": trainer.model.sparsity.lam}
    torch.save(record | {"weights": trainer.model.state_dict()}, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_have_the_lambda_of_one(tmp_path, accumulate):
    run_ranks(_ddp, tmp_path, accumulate)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["lam"], second["lam"])
    assert first["log"][0] == second["log"][0] or not second["log"][0]  # ranks but the first may log nothing
    options = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    single = train(tiny(router_options={"load_balance": False}), tmp_path / "single", **options)
    assert logged(single, "sparsity") == pytest.approx(first["log"][1], abs=1e-6)
    assert torch.equal(single.model.sparsity.lam, first["lam"])
    for name, value in single.model.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5)


def test_model_is_left_as_it_was(tmp_path):
    model = tiny()
    before = set(copy.copy(model.__dict__))
    train(model, tmp_path)
    assert set(model.__dict__) - before <= {
        "forward",
        "_original_forward",
        "_is_accelerate_prepared",
    }
