"""Experts spread over two ranks give what one process gives: outputs and every gradient; bytes are as promised."""

import pytest
import torch
import torch.distributed as dist
from experts.cases import with_room
from ranks import run_ranks
from torch.autograd.graph import saved_tensors_hooks

from remoe.experts import naive_experts
from remoe.experts.exchange import exchange_experts, plan_exchange
from remoe.routing.assignment import Assignment

D, F, E, P = 5, 3, 4, 2
TOKENS = (7, 9)  # of each rank
MANY = 1000  # rows: one round
CASES = {  # share of active pairs, tokens of each rank, experts that are active, rows that a rank receives at a time
    "sparse": (0.3, TOKENS, slice(None), MANY),
    "dense stage": (1.0, TOKENS, slice(None), MANY),
    "dense stage in rounds of a few rows": (1.0, TOKENS, slice(None), 6),
    "sparse in rounds of one row from each": (0.3, TOKENS, slice(None), 1),
    "all to one rank": (0.6, TOKENS, slice(2, 4), MANY),
    "all to one rank in rounds": (0.6, TOKENS, slice(2, 4), 4),
    "all from one expert": (0.6, TOKENS, slice(0, 1), MANY),
    "no pair": (0.0, TOKENS, slice(None), MANY),
    "a rank without tokens": (0.5, (0, 9), slice(None), MANY),
    "a rank without tokens in rounds": (0.5, (7, 0), slice(None), 2),
}


def problem(case, dtype=torch.float64):
    """Tokens, gates and gradients of all ranks one after the other, and weights of all experts."""
    density, tokens, experts, _ = CASES[case]
    torch.manual_seed(0)
    T = sum(tokens)
    sizes = (T, D), (E, 2 * F, D), (E, D, F), (T, E)
    leaves = [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]
    active_TE = torch.zeros(T, E, dtype=torch.bool)
    active_TE[:, experts] = torch.rand(T, E)[:, experts] < density
    return leaves, active_TE, torch.randn(T, D, dtype=dtype)


def share(case, rank):
    """The same for one rank: its tokens, gates and gradients, and the weights of its experts."""
    leaves, active_TE, dy_TD = problem(case)
    first = sum(CASES[case][1][:rank])
    rows, own = slice(first, first + CASES[case][1][rank]), slice(rank * E // P, (rank + 1) * E // P)
    leaves = [leaf.detach()[part].requires_grad_() for leaf, part in zip(leaves, (rows, own, own, rows), strict=True)]
    return leaves, active_TE[rows], dy_TD[rows]


def _ranks(rank, folder):
    sent = []
    send, gather = dist.all_to_all_single, dist.all_gather

    def counted(out, rows, received, given, group):
        sent[-1] += sum(n for other, n in enumerate(given) if other != rank) * rows[:0].element_size() * D
        return send(out, rows, received, given, group=group)

    def counted_gather(out, own, group):
        sent[-1] += own.numel() * own.element_size() * (P - 1)
        return gather(out, own, group=group)

    dist.all_to_all_single, dist.all_gather = counted, counted_gather
    results = {}
    for case in CASES:
        leaves, active_TE, dy_TD = share(case, rank)
        for room in (False, True):
            for leaf in leaves:
                leaf.grad = None
            pairs = Assignment.from_gates(leaves[3], active_TE)
            sent.append(0)
            options = {"group": dist.group.WORLD, "backend": "naive", "receive_rows": CASES[case][3]}
            kept = []
            with saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor):
                y_TD = exchange_experts(*leaves[:3], with_room(pairs) if room else pairs, **options)
            sent.append(0)
            y_TD.backward(dy_TD)
            results[case, room] = [y_TD.detach(), *(leaf.grad for leaf in leaves)]
        sent.append(0)
        plan = plan_exchange(pairs.count_E, dist.group.WORLD, CASES[case][3])
        results[case, "bytes"] = sent[-3:-1], plan.bytes_sent(D, 8), plan.num_rounds
        numbers = {t.untyped_storage().data_ptr(): t.numel() for t in kept if t.is_floating_point()}
        results[case, "kept"] = sum(numbers.values())
        results[case, "most"] = max(sum(turn.received_P) for turn in plan.rounds())
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    run_ranks(_ranks, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(P)]


@pytest.mark.parametrize("room", [False, True], ids=["full list", "room to spare"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_one_process(results, case, room):
    leaves, active_TE, dy_TD = problem(case)
    y_TD = naive_experts(*leaves[:3], Assignment.from_gates(leaves[3], active_TE))
    y_TD.backward(dy_TD)
    expected = [y_TD.detach(), *(leaf.grad for leaf in leaves)]
    for index, value in enumerate(expected):
        ours = torch.cat([result[case, room][index] for result in results])
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_what_is_sent_is_what_the_plan_says(results, case):
    for result in results:
        sent, promised, _ = result[case, "bytes"]
        assert tuple(sent) == promised
    # no padding: every pair whose expert is on the other rank travels once each way
    _, active_TE, _ = problem(case)
    first_rank_T = torch.arange(len(active_TE)) < CASES[case][1][0]
    remote = active_TE[first_rank_T, E // P :].sum() + active_TE[~first_rank_T, : E // P].sum()
    forward = sum(result[case, "bytes"][0][0] for result in results)
    assert forward == 2 * remote.item() * D * 8 + P * E * 8


@pytest.mark.parametrize("case", CASES)
def test_no_rank_receives_more_than_its_budget(results, case):
    budget = max(CASES[case][3], P)
    assert {result[case, "bytes"][2] for result in results} == {results[0][case, "bytes"][2]}
    assert all(result[case, "most"] <= budget for result in results)
    assert (results[0][case, "bytes"][2] > 1) == (CASES[case][3] < MANY)


def test_rounds_bound_what_is_kept_for_the_backward_pass(results):
    for result in results:
        whole, rounds = (result[f"dense stage{words}", "kept"] for words in ("", " in rounds of a few rows"))
        assert rounds < whole / 2  # tokens, gates and weights, and the first of six rounds
