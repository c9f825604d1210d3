"""Ranks that hold the same tokens exchange a slice each: outputs and every gradient are those of one process."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from experts.cases import with_room
from ranks import run_ranks

from remoe.experts import naive_experts
from remoe.experts.exchange import exchange_experts
from remoe.experts.slices import in_slices
from remoe.routing.assignment import Assignment

D, F, E, P = 5, 3, 4, 2
CASES = {  # tokens, share of active pairs
    "sparse": (7, 0.3),
    "dense stage": (8, 1.0),
    "no pair": (7, 0.0),
    "one token, so a rank has none": (1, 1.0),
    "no token": (0, 1.0),
}


def problem(case):
    """Tokens, gates, the gradient of the output, and the weights of all experts."""
    tokens, density = CASES[case]
    torch.manual_seed(0)
    sizes = (tokens, D), (E, 2 * F, D), (E, D, F), (tokens, E)
    leaves = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes]
    return leaves, torch.rand(tokens, E) < density, torch.randn(tokens, D, dtype=torch.float64)


def _ranks(rank, folder):
    group, results = dist.group.WORLD, {}
    for case in CASES:
        for room in (False, True):
            (x_TD, gate_up_E2FD, down_EDF, gate_TE), active_TE, dy_TD = problem(case)
            own = [weight.detach().chunk(P)[rank].requires_grad_() for weight in (gate_up_E2FD, down_EDF)]

            def run(x_rD, pairs, own=own):
                return exchange_experts(x_rD, *own, pairs, group, "naive", receive_rows=4)

            pairs = Assignment.from_gates(gate_TE, active_TE)
            y_TD = in_slices(run, x_TD, with_room(pairs) if room else pairs, group)
            y_TD.backward(dy_TD)
            results[case, room] = [y_TD.detach(), x_TD.grad, gate_TE.grad], [weight.grad for weight in own]
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    run_ranks(_ranks, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(P)]


@pytest.mark.parametrize("room", [False, True], ids=["full list", "room to spare"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_one_process(results, case, room):
    (x_TD, gate_up_E2FD, down_EDF, gate_TE), active_TE, dy_TD = problem(case)
    y_TD = naive_experts(x_TD, gate_up_E2FD, down_EDF, Assignment.from_gates(gate_TE, active_TE))
    y_TD.backward(dy_TD)
    equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    for shared, _ in (result[case, room] for result in results):
        for ours, expected in zip(shared, (y_TD, x_TD.grad, gate_TE.grad), strict=True):
            equal(ours, expected.detach())
    for index, weight in enumerate((gate_up_E2FD, down_EDF)):
        equal(torch.cat([result[case, room][1][index] for result in results]), weight.grad)
