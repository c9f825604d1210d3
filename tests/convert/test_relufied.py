"""A relufied model in use: the penalty, padding, recomputation, compilation, copies."""

import copy

import pytest
import torch
from tiny_models import build, token_ids
from torch.nn import functional as F

import remoe
from remoe.errors import ConfigError
from remoe.experts import stored_pairs
from remoe.routing.regularizers import l1_loss


def test_penalty_is_lambda_times_the_mean_over_layers():
    model, ids = build("mixtral"), token_ids()
    remoe.relufy(model, [ids], load_balance=False)
    model.sparsity.lam.fill_(0.5)
    plain = model(input_ids=ids, labels=ids).loss
    model.train()
    penalised = model(input_ids=ids, labels=ids).loss
    gates = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: gates.append(output[1].detach()))
    model(input_ids=ids)
    tokens = torch.tensor(ids.numel())
    expected = 0.5 * torch.stack([l1_loss(gate_TE, num_tokens=tokens) for gate_TE in gates]).mean()
    torch.testing.assert_close(penalised - plain, expected, rtol=1e-3, atol=1e-5)
    assert expected > 0.01


def test_share_of_a_micro_batch():
    model, ids = build("qwen3_moe"), token_ids()
    remoe.relufy(model, [ids], load_balance=False)
    model.train().sparsity.lam.fill_(0.5)
    items = 8 * 23
    whole = model(input_ids=ids, labels=ids, num_items_in_batch=items).loss
    parts = [model(input_ids=part, labels=part, num_items_in_batch=items).loss for part in ids.split(2)]
    torch.testing.assert_close(sum(parts), whole)


def test_padding_is_not_counted():
    model, ids = build("mixtral"), token_ids(4, 12)
    remoe.relufy(model, [ids])
    model.train()
    padded = F.pad(ids, (5, 0))
    mask = F.pad(torch.ones_like(ids), (5, 0))
    model(input_ids=ids, labels=ids)
    model.update_routing()
    load_LE = model.sparsity.load_LE.clone()
    model(input_ids=padded, attention_mask=mask, labels=padded)
    assert model.sparsity._tokens_L.tolist() == [48, 48]
    model.update_routing()
    torch.testing.assert_close(model.sparsity.load_LE, load_LE)


def test_recomputation_counts_once_and_has_the_same_gradients():
    model, ids = build("qwen2_moe"), token_ids()
    remoe.relufy(model, [ids])
    other = copy.deepcopy(model).train()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for m in (model, other):
        m(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(model.sparsity._tokens_L, other.sparsity._tokens_L)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_recomputed_layers_meet_the_mask_of_their_own_forward_pass():
    model = build("mixtral").eval()
    early = copy.deepcopy(model)
    early.gradient_checkpointing_enable({"use_reentrant": False})
    for m in (model, early):
        remoe.relufy(m, [token_ids()], max_loss_increase=None)
    ids, gradients = token_ids(2), []
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[0][0, :3], masks[1][1, :5] = 0, 0
    for how in ("never", "late", "early"):
        other = copy.deepcopy(early if how == "early" else model).train()  # a copy has a context of its own
        if how == "late":
            other.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [other(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss for mask in masks]
        sum(losses).backward()
        assert other._routing_context.routings is None  # which would hold what was recomputed
        gradients.append([p.grad for p in other.parameters() if p.grad is not None])
    for a, b, c in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_a_part_of_a_model_knows_no_mask_of_an_earlier_call():
    model, ids = build("mixtral"), token_ids(2)
    remoe.relufy(model, [ids], max_loss_increase=None)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        before = model.model(ids).last_hidden_state
        model(ids, attention_mask=mask)
        assert torch.equal(model.model(ids).last_hidden_state, before)


def test_of_the_experts_that_a_relufied_model_lists_it_keeps_the_wanted_ones(tmp_path):
    """On CUDA the lists have room for all of them."""
    model, ids, kept = build("mixtral"), token_ids(2), []
    report = remoe.relufy(model, [ids], max_loss_increase=None)
    model.save_pretrained(tmp_path)
    for one in (model, remoe.load_relufied(tmp_path)):
        with pytest.MonkeyPatch.context() as patch:
            ours = "remoe.convert.relufy.experts.run_experts"
            patch.setattr(ours, lambda x, *rest, stored, adapters: (kept.append(stored), x)[1])
            one(ids)
    wanted = stored_pairs(torch.empty(ids.numel(), 1), report.num_experts, report.k)
    assert wanted < ids.numel() * report.num_experts
    assert kept == [wanted] * (2 * len(report.routers))


@pytest.mark.slow
def test_a_relufied_model_compiles_in_one_graph():
    model, ids = build("mixtral"), token_ids(2)
    remoe.relufy(model, [ids], max_loss_increase=None)
    model.train()
    expected = model(ids, labels=ids).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, labels=ids).loss, expected)


def test_a_pickled_model_is_the_same(tmp_path):
    model, ids = build("mixtral"), token_ids()
    remoe.relufy(model, [ids], max_loss_increase=None)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(again) is type(model)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_copied_model_counts_for_itself():
    model = build("mixtral")
    remoe.relufy(model, [token_ids()], max_loss_increase=None)
    other = copy.deepcopy(model).train()
    other(token_ids(), labels=token_ids())
    assert other.sparsity._tokens_L.any()
    assert not model.sparsity._tokens_L.any()
    assert model._routing_context is not other._routing_context


DIAL = {"gate_threshold": torch.tensor([0.0, 0.05, 0.0]), "max_experts": torch.tensor([9, 9, 1])}  # by row


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_each_row_has_its_own_gate_threshold_and_cap(name):
    model, ids = build(name).eval(), token_ids(3)
    remoe.relufy(model, [ids], max_loss_increase=None)
    together, unlimited = model(ids, **DIAL), model(ids)
    by_token = {name: value.reshape(-1, 1).expand(ids.shape) for name, value in DIAL.items()}
    assert torch.equal(model(ids, **by_token).logits, together.logits)
    for i, (threshold, cap) in enumerate(zip(*(value.tolist() for value in DIAL.values()), strict=True)):
        model.set_gate_threshold(threshold)
        model.set_max_experts(cap)
        alone = model(ids[i : i + 1])
        model.set_gate_threshold(0)
        model.set_max_experts(None)
        torch.testing.assert_close(together.logits[i], alone.logits[0], rtol=1e-4, atol=1e-5)
        assert (i > 0) == any(
            ours.count_E.sum() < routed.gate_TE.unflatten(0, ids.shape)[i].count_nonzero()
            for ours, routed in zip(alone.routings, unlimited.routings, strict=True)
        )
    assert torch.equal(model(ids).logits, unlimited.logits)  # a call leaves nothing behind


def test_generate_takes_the_dial_for_each_row_and_each_beam():
    model, ids = build("mixtral").eval(), token_ids(3)
    remoe.relufy(model, [ids], max_loss_increase=None)

    def write(ids, **options):
        return model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, **options)

    def alone(**options):
        rows = [{name: value[i].item() for name, value in DIAL.items()} for i in range(3)]
        return torch.cat([write(ids[i : i + 1], **row, **options) for i, row in enumerate(rows)])

    assert torch.equal(write(ids, **DIAL), alone())
    assert torch.equal(write(ids, num_beams=2, **DIAL), alone(num_beams=2))
    first = write(ids, max_experts=1, output_logits=True, return_dict_in_generate=True).logits[0]
    model.set_max_experts(1)
    assert torch.equal(first, model(ids, logits_to_keep=1).logits[:, -1])
    model.set_max_experts(None)
    assert not torch.allclose(first, model(ids).logits[:, -1])


def test_a_wrong_dial_of_a_call_is_refused():
    model, ids = build("mixtral").eval(), token_ids(2)
    remoe.relufy(model, [ids], max_loss_increase=None)
    for given in ({"max_experts": 0}, {"gate_threshold": -1}, {"max_experts": torch.ones(3)}):
        with pytest.raises(ConfigError, match="must be"):
            model(ids, **given)
    assert not model._routing_context.dial
