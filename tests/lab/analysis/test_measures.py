"""Measures on small cases whose results were worked out by hand."""

import math

import pytest
import torch

from remoe.errors import ConfigError
from remoe.lab.analysis import measures


def active(*layers):
    """(L, T, E) bool from a string a layer: words are tokens, digits their experts' states."""
    return torch.tensor([[[digit == "1" for digit in token] for token in layer.split()] for layer in layers])


def ids(*values):
    return torch.tensor(values)


def kept(text):
    return torch.tensor([digit == "1" for digit in text])


NAN = pytest.approx(math.nan, nan_ok=True)


# Flips


def test_flip_rate_is_the_share_of_changed_triples():
    before = active("100 010 001", "110 110 000")
    after = active("100 001 001", "110 100 000")
    # Token 1 of layer 0 moves (two triples), token 1 of layer 1 loses an expert (one): 3 of 2 * 3 * 3.
    assert measures.flip_rate(before, after) == 3 / 18
    assert measures.flip_rate(before, before) == 0
    assert measures.flip_rate(before, ~before) == 1


def test_flips_of_padding_do_not_count():
    before, after = active("10 10 00"), active("10 01 11")
    assert measures.flip_rate(before, after, kept("110")) == 0.5
    assert measures.flip_rate(before, after, kept("100")) == 0
    assert measures.flip_rate(before, after, kept("000")) == NAN


# Active experts and frequency


def test_active_experts_of_a_token_id_are_means_over_occurrences_and_layers():
    routing = active("110 000 100 111", "100 000 010 111")
    activity = measures.active_by_token(routing, ids(7, 2, 7, 900))
    assert activity.token_U.tolist() == [2, 7, 900]
    assert activity.count_U.tolist() == [1, 2, 1]
    # Id 7: 2 and 1 experts in layer 0, 1 and 1 in layer 1.
    assert activity.active_U.tolist() == [0, 5 / 4, 3]
    assert activity.active_U.dtype == torch.float64


def test_rare_ids_and_padding_can_be_left_out():
    routing, tokens = active("11 10 10 11 00"), ids(5, 5, 3, 3, 3)
    assert measures.active_by_token(routing, tokens, min_count=3).token_U.tolist() == [3]
    without_last = measures.active_by_token(routing, tokens, mask_T=kept("11110"))
    assert without_last.count_U.tolist() == [2, 2]
    assert without_last.active_U.tolist() == [1.5, 1.5]
    assert measures.active_by_token(routing, tokens, min_count=3, mask_T=kept("11110")).token_U.tolist() == []


def test_rank_correlation_sees_order_only():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert measures.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert measures.rank_correlation(x, -(x**3)) == pytest.approx(-1)
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert measures.rank_correlation(x, torch.tensor([20, 10, 40, 30])) == pytest.approx(0.6)


def test_equal_values_share_their_mean_rank():
    # Ranks 1 2.5 2.5 4 against 1 2 3 4, both of mean 2.5: covariance 4.5, squares 4.5 and 5.
    correlation = measures.rank_correlation(torch.tensor([1, 5, 5, 9]), torch.tensor([1, 2, 3, 4]))
    assert correlation == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    # Ranks 2 2 2 4 against 1.5 1.5 3.5 3.5: deviations -.5 -.5 -.5 1.5 and -1 -1 1 1.
    correlation = measures.rank_correlation(torch.tensor([0, 0, 0, 1]), torch.tensor([3, 3, 4, 4]))
    assert correlation == pytest.approx(2 / math.sqrt(3 * 4))


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1], [1, 2, 3]), ([4], [4]), ([], [])])
def test_no_order_no_correlation(x, y):
    assert measures.rank_correlation(torch.tensor(x), torch.tensor(y)) == NAN


def test_rare_tokens_with_more_experts_correlate_negatively():
    routing = active("111 110 110 100 100 100")
    activity = measures.active_by_token(routing, ids(1, 2, 2, 3, 3, 3))
    assert activity.frequency_correlation == pytest.approx(-1)


# Shares, sparsity, load


def test_share_of_tokens_per_expert_and_layer():
    routing = active("110 100 100 101", "000 000 001 001")
    share = measures.routed_share(routing)
    assert share.tolist() == [[1, 0.25, 0.25], [0, 0, 0.5]]
    assert share.sum(dim=1).tolist() == [1.5, 0.5]  # active experts per token
    assert measures.routed_share(routing, kept("0011")).tolist() == [[1, 0, 0.5], [0, 0, 1]]
    assert measures.routed_share(routing, kept("0000")).isnan().all()


def test_shares_by_domain_are_of_the_domains_own_tokens():
    routing = active("10 10 11 01", "00 01 11 10")
    share = measures.routed_share_by_domain(routing, ids(0, 0, 2, 0), 3)
    thirds = [[[2 / 3, 1 / 3], [1 / 3, 1 / 3]], [[1, 1], [1, 1]]]
    assert torch.allclose(share[[0, 2]], torch.tensor(thirds, dtype=torch.float64))
    assert share[1].isnan().all()  # no token
    assert share[[0, 2]].sum(dim=2).flatten().tolist() == pytest.approx([1, 2 / 3, 2, 2])
    masked = measures.routed_share_by_domain(routing, ids(0, 0, 2, 0), 3, kept("0111"))
    assert masked[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_an_expert_under_an_eighth_of_the_mean_load_is_inactive():
    share = torch.tensor([[0.0, 1 / 64, 0.0156, 0.5, 0.5, 0.5, 0.5, 0.5]])
    assert measures.inactive_below(8, 1) == 1 / 64  # Fig. 8
    assert measures.inactive_experts(share, 1).tolist() == [[True, False, True] + [False] * 5]
    assert measures.inactive_experts(share, 2).tolist() == [[True, True, True] + [False] * 5]
    even = torch.full((2, 128), 1 / 128)  # a perfectly balanced layer has no inactive expert, whatever its E
    assert not measures.inactive_experts(even, 1).any()


def test_sparsity_of_each_layer():
    routing = active("1000 1100 0000", "1111 1111 1111", "0000 0000 0000")
    assert measures.sparsity_per_layer(routing).tolist() == [0.75, 0, 1]
    assert measures.sparsity_per_layer(routing, kept("010")).tolist() == [0.5, 0, 1]


def test_load_imbalance_runs_from_one_to_the_number_of_experts():
    routing = active("100 010 001", "100 100 100", "110 100 000", "000 000 000")
    even, one, mixed, none = measures.load_imbalance(routing).tolist()
    # Loads 2 1 0: twice the mean of 1.
    assert (even, one, mixed) == (1, 3, 2)
    assert none == NAN
    assert measures.load_imbalance(routing, kept("110"))[0] == 1.5


# Specialisation


def test_experts_that_give_the_domain_away_carry_its_whole_entropy():
    routing = active("10 10 01 01", "10 01 10 01", "11 11 11 11")
    told = measures.specialisation(routing, ids(0, 0, 1, 1), 2)
    assert told.nats_L.tolist() == pytest.approx([math.log(2), 0, 0], abs=1e-12)
    assert told.normalised_L.tolist() == pytest.approx([1, 0, 0], abs=1e-12)


def test_information_of_an_uneven_table():
    # Pairs by (domain, expert): 2 1 / 0 1. P = 1/2 1/4 / 0 1/4, margins 3/4 1/4 and 1/2 1/2.
    routing, domains = active("10 11 01"), ids(0, 0, 1)
    nats = 0.5 * math.log(0.5 / (0.75 * 0.5)) + 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(0.25 / 0.125)
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    told = measures.specialisation(routing, domains, 2)
    assert told.nats_L.item() == pytest.approx(nats)
    assert told.normalised_L.item() == pytest.approx(nats / entropy)
    # An expert and a domain without a pair change nothing, nor does a padding token.
    routing = torch.nn.functional.pad(active("10 11 01 11"), (0, 1))
    padded = measures.specialisation(routing, ids(0, 0, 1, 1), 3, kept("1110"))
    assert padded.nats_L.item() == pytest.approx(nats)
    assert padded.normalised_L.item() == pytest.approx(nats / entropy)


def test_information_without_pairs_or_with_one_domain():
    one_domain = measures.specialisation(active("10 01"), ids(0, 0), 1)
    assert one_domain.nats_L.item() == 0
    assert one_domain.normalised_L.item() == NAN
    for seed in range(20):  # not by a lucky rounding
        expert_T = torch.randint(16, (3000,), generator=torch.Generator().manual_seed(seed))
        of_many = measures.specialisation(torch.nn.functional.one_hot(expert_T, 16)[None].bool(), ids(*[0] * 3000), 1)
        assert of_many.nats_L.item() < 1e-12
        assert of_many.normalised_L.item() == NAN
    assert measures.specialisation(active("00 00"), ids(0, 1), 2).nats_L.item() == NAN


# Top tokens


def test_top_tokens_by_probability_then_count_then_id():
    #           8   8   4   4   4   6   6   9
    routing = active("110 100 110 010 000 100 100 010")[0]
    tokens = ids(8, 8, 4, 4, 4, 6, 6, 9)
    first, second, third = measures.top_tokens(routing, tokens, 5)
    # Expert 0: 8 and 6 always (equal counts: the lower id first), 4 once in three, 9 never.
    assert first == [(6, 1, 2), (8, 1, 2), (4, pytest.approx(1 / 3), 3)]
    # Expert 1: 9 always, 4 twice in three, 8 once in two.
    assert second == [(9, 1, 1), (4, pytest.approx(2 / 3), 3), (8, 0.5, 2)]
    assert third == []
    assert [token for token, _, _ in measures.top_tokens(routing, tokens, 1)[0]] == [6]
    # Equal probabilities: the more frequent id first.
    assert [top.token for top in measures.top_tokens(active("1 1 1")[0], ids(1, 2, 2), 2)[0]] == [2, 1]


def test_top_tokens_without_rare_ids_and_padding():
    routing, tokens = active("10 10 01 01")[0], ids(3, 3, 3, 5)
    assert measures.top_tokens(routing, tokens, 3, min_count=2) == [
        [(3, pytest.approx(2 / 3), 3)],
        [(3, pytest.approx(1 / 3), 3)],
    ]
    assert measures.top_tokens(routing, tokens, 3, mask_T=kept("1101")) == [[(3, 1, 2)], [(5, 1, 1)]]
    assert measures.top_tokens(routing, tokens, 3, min_count=4) == [[], []]


# Neighbouring tokens


def test_chunk_sparsity_is_of_the_union():
    routing = active("1000 0100 1000 1000", "1100 0011 0000 0000")
    sequence = ids(0, 0, 0, 0)
    # Chunks of two: unions of 2 and 1 of 4 experts in layer 0, of 4 and 0 in layer 1.
    assert measures.chunk_sparsity(routing, sequence, 2).tolist() == [1 - 1.5 / 4, 0.5]
    assert measures.chunk_sparsity(routing, sequence, 4).tolist() == [0.5, 0]
    # One chunk of three; the fourth token is left out.
    assert measures.chunk_sparsity(routing, sequence, 3).tolist() == [0.5, 0]
    assert torch.equal(measures.chunk_sparsity(routing, sequence, 1), measures.sparsity_per_layer(routing))


def test_chunks_end_with_their_sequence():
    routing = active("10 10 10 01 11 01 01")
    sequence = ids(4, 4, 4, 1, 2, 2, 2)
    # Chunks (10 10) and (11 01); 10, the sequence 01 and the last 01 fill none.
    assert measures.chunk_sparsity(routing, sequence, 2).tolist() == [0.25]
    assert measures.chunk_sparsity(routing, sequence, 3).tolist() == [0.25]
    assert measures.chunk_sparsity(routing, sequence, 4).tolist() == [NAN]


def test_padding_is_in_no_chunk():
    routing = active("11 10 10 11 01 01")
    sequence = ids(0, 0, 0, 1, 1, 1)
    mask = kept("011011")
    assert measures.chunk_sparsity(routing, sequence, 2, mask).tolist() == [0.5]
    assert measures.chunk_sparsity(routing, sequence, 2, kept("000000")).tolist() == [NAN]


def test_a_chunk_needs_a_token():
    with pytest.raises(ConfigError, match="at least one token, not 0"):
        measures.chunk_sparsity(active("1"), ids(0), 0)


def test_reuse_is_the_share_of_experts_that_the_next_token_keeps():
    routing = active("110 011 011 000 100", "100 010 001 100 111")
    # Layer 0: 1/2, 2/2, 0/2; the empty token is left out as a first and counts as a second. Layer 1: 0, 0, 0, 1/1.
    assert measures.expert_reuse(routing, ids(0, 0, 0, 0, 0)).tolist() == [0.5, 0.25]


def test_neighbours_are_of_one_sequence_and_no_padding():
    routing = active("10 10 10 01 11")
    # Pairs (0, 1) and (3, 4): both keep their expert; (1, 2) and (2, 3) cross sequences.
    assert measures.expert_reuse(routing, ids(0, 0, 1, 2, 2)).tolist() == [1]
    assert measures.expert_reuse(routing, ids(0, 0, 0, 0, 0)).tolist() == [0.75]
    assert measures.expert_reuse(routing, ids(0, 0, 0, 0, 0), kept("11100")).tolist() == [1]
    assert measures.expert_reuse(routing, ids(0, 1, 2, 3, 4)).tolist() == [NAN]


# One token


def test_one_token():
    routing, zero = active("1010"), ids(0)
    assert measures.routed_share(routing).tolist() == [[1, 0, 1, 0]]
    assert measures.sparsity_per_layer(routing).tolist() == [0.5]
    assert measures.load_imbalance(routing).tolist() == [2]
    assert measures.active_by_token(routing, zero).active_U.tolist() == [2]
    assert measures.active_by_token(routing, zero).frequency_correlation == NAN
    assert measures.chunk_sparsity(routing, zero, 1).tolist() == [0.5]
    assert measures.chunk_sparsity(routing, zero, 2).tolist() == [NAN]
    assert measures.expert_reuse(routing, zero).tolist() == [NAN]
    assert measures.top_tokens(routing[0], zero, 2) == [[(0, 1, 1)], [], [(0, 1, 1)], []]
