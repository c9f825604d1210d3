"""The load in the balanced penalty is counted over the micro-batches of a step so far."""

import pytest
import torch

from remoe.lab.data import open_dataset
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.trainer import Trainer
from remoe.routing.base import Router, scaled_load

MICRO_BATCHES = 3


def trainer_on(corpus, folder, micro_batches=MICRO_BATCHES, **changed):
    values = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {"model": values, "seq_len": 16, "batch_size": 2 * micro_batches, "micro_batch_size": 2, "steps": 9}
    values |= {"num_experts": 4, "device": "cpu", "data": str(corpus), **changed}
    return Trainer(config_from_dict(values, "test"), open_dataset(corpus), RunFolder(folder))


@pytest.fixture
def calls(monkeypatch):
    """(router, tokens of each expert in the micro-batch, load that its loss takes) of each call of `Router.counted`."""
    found, counted = [], Router.counted

    def recorded(router, active_TE, num_tokens):
        counted_E1 = counted(router, active_TE, num_tokens)
        found.append((router, active_TE.sum(dim=0), scaled_load(counted_E1, num_tokens)))
        return counted_E1

    monkeypatch.setattr(Router, "counted", recorded)
    return found


def courses(trainer, calls, passes):
    """For each layer, (micro-batches, passes, E): tokens of each expert in the micro-batch, and the load."""
    for router in trainer.model.sparsity.routers:
        own, loads = zip(*((own_E, load_E) for of, own_E, load_E in calls if of is router), strict=True)
        yield [torch.stack(tensors).unflatten(0, (-1, passes)) for tensors in (own, loads)]


@pytest.mark.parametrize("options", [{}, {"router_options": {"max_experts_per_token": 1}}], ids=["relu", "capped"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_each_micro_batch_balances_the_load_of_the_step_so_far(corpus, tmp_path, calls, options, recompute):
    trainer, passes = trainer_on(corpus, tmp_path, recompute=recompute, **options), 1 + recompute
    trainer._backward()
    trainer.model.sparsity.discard_statistics()  # that step was broken off
    for _ in range(2):
        calls.clear()
        trainer._backward()
        trainer.model.update_routing()
        for own_MPE, load_MPE in courses(trainer, calls, passes):
            assert torch.equal(own_MPE[:, 0], own_MPE[:, -1])  # recomputed as it was
            so_far_MPE = own_MPE.cumsum(dim=0)
            assert not torch.equal(so_far_MPE[1] / 2, own_MPE[1])
            for number in range(MICRO_BATCHES):
                torch.testing.assert_close(load_MPE[number], so_far_MPE[number] / (number + 1), check_dtype=False)
                assert torch.equal(load_MPE[number, 0], load_MPE[number, -1])


def test_the_last_micro_batch_sees_the_load_of_the_whole_batch(corpus, tmp_path, calls):
    trainer = trainer_on(corpus, tmp_path)
    trainer._backward()
    for (_, load_MPE), load_E in zip(courses(trainer, calls, 1), _loads(trainer), strict=True):
        torch.testing.assert_close(load_MPE[-1, 0], load_E * 2 * 16)  # tokens of a micro-batch


def _loads(trainer):
    trainer.model.update_routing()
    return trainer.model.sparsity.load_LE


@pytest.mark.parametrize("options", [{"mesh_load": "official"}, {"micro_batches": 1}], ids=["official", "whole batch"])
def test_otherwise_each_micro_batch_balances_its_own_load(corpus, tmp_path, calls, options):
    trainer = trainer_on(corpus, tmp_path, **options)
    for _ in range(2):
        trainer._backward()
        trainer.model.update_routing()
    for own_MPE, load_MPE in courses(trainer, calls, 1):
        assert torch.equal(load_MPE, own_MPE)
