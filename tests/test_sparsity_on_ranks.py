"""The controller in several processes."""

import pytest
import torch
from ranks import run_ranks

import remoe
from remoe.routing.assignment import Assignment, Routing
from remoe.sparsity import SparsityController

pytestmark = pytest.mark.slow


def _rank(rank, folder):
    controller = SparsityController(1, 8, 1)
    pairs, tokens = (400, 100) if rank == 0 else (0, 300)
    active_TE = (torch.arange(tokens * 8) < pairs).view(tokens, 8)
    gate_TE = active_TE.float()
    assignment = Assignment.from_gates(gate_TE, active_TE)
    controller.observe([Routing(assignment, gate_TE, None, torch.tensor(tokens), gate_TE.sum())])
    reduced, reduce = [], torch.distributed.all_reduce

    def recorded(tensor, group):
        reduced.append(tensor.numel())
        reduce(tensor, group=group)

    torch.distributed.all_reduce = recorded
    controller.update()
    torch.save((controller.lam.item(), controller.sparsity.item(), reduced), folder / str(rank))


def test_ranks_agree_on_the_sum_of_their_statistics(tmp_path):
    run_ranks(_rank, tmp_path)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first == second
    assert first[1] == pytest.approx(1 - 400 / 3200)
    assert first[2] == [8 + 8 + 1 + 1 + 1]  # one collective a step


def _wrapped_rank(rank, folder):
    config = remoe.RemoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_experts=4, initializer_range=0.5
    )
    torch.manual_seed(0)
    model = remoe.RemoeForCausalLM(config).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    pairs = slots = 0
    for length in (8, 5, 9):  # micro-batches, each of which DDP synchronises
        ids = torch.randint(32, (2, length + rank))
        output = wrapped(ids, labels=ids)
        output.loss.backward()
        pairs += sum(routing.count_E.sum().item() for routing in output.routings)
        slots += 2 * 4 * ids.numel()
    model.update_routing()
    torch.save((pairs, slots, model.sparsity.sparsity.item()), folder / str(rank))


def test_ddp_leaves_each_rank_its_statistics(tmp_path):
    run_ranks(_wrapped_rank, tmp_path)
    pairs, slots, sparsities = zip(*(torch.load(tmp_path / str(rank)) for rank in range(2)), strict=True)
    assert pairs[0] / slots[0] != pytest.approx(pairs[1] / slots[1], rel=1e-4)
    assert sparsities[0] == sparsities[1] == pytest.approx(1 - sum(pairs) / sum(slots), abs=1e-6)
