"""transformers' Trainer with our callback on two processes gives the lambda and sparsity of one process."""

import pytest
import torch
import transformers
from packaging import version
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, MixtralForCausalLM

import remoe

pytest.importorskip("accelerate")

from tiny_trainer import TINY, tiny, train

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")]


def relufied():
    torch.manual_seed(0)
    sizes = {key: value for key, value in TINY.items() if key not in ("num_experts", "sparsity")}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
    remoe.relufy(model, [torch.arange(61)[None, :32]], max_loss_increase=None)
    return model.train()


def own():
    return tiny(router_options={"load_balance": False})  # a sum over tokens, whoever computes them


WAYS = {  # model, and the mesh of `remoe.models.sharding.shard`; without one the Trainer chooses DDP
    "own ddp": (own, {}),
    "own fsdp2": (own, {"fsdp": 2}),
    "own fsdp2 x ep": (own, {"fsdp": 2, "ep": 2}),
    "relufied ddp": (relufied, {}),
    "relufied fsdp2": (relufied, {"fsdp": 2}),
}


def figures(trainer):
    return [(log["loss"], log["lambda"], log["sparsity"]) for log in trainer.state.log_history if "lambda" in log]


def _on_ranks(rank, folder):
    from remoe.models.sharding import shard

    for way, (make, mesh) in WAYS.items():
        model = make()
        if mesh:
            shard(model, torch.device("cpu"), **mesh)
        trainer = train(model, folder / way, per_device_train_batch_size=2)
        sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model_wrapped.parameters())
        assert sharded == ("fsdp2" in way), way
        torch.save(figures(trainer), folder / f"{way}-{rank}.pt")


def test_two_processes_steer_as_one_does(tmp_path):
    expected = {}
    for make in (own, relufied):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # the same micro-batches
        expected[make] = figures(train(make(), tmp_path / "one", **options))
    run_ranks(_on_ranks, tmp_path)
    for way, (make, _) in WAYS.items():
        first, second = (torch.load(tmp_path / f"{way}-{rank}.pt") for rank in range(2))
        assert [step[1:] for step in first] == [step[1:] for step in second], way
        assert len(first) == 4
        for found, wanted in zip(first, expected[make], strict=True):
            assert found == pytest.approx(wanted, rel=1e-5), way
