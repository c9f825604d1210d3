"""Every router inside a model: what is causal, padding, shared experts, training, saving."""

import pytest
import reference
import torch

import remoe
from remoe.errors import ConfigError
from remoe.layer import MoE
from remoe.routing import ROUTERS

D, E = 20, 5


def small_model(router, **options):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4}
    if router == "lory":
        options = {"router_options": {"segment": 4, **options}}
    elif options:
        options = {"router_options": options}
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, router=router, initializer_range=0.3, **options))


CASES = [(name, {}) for name in ROUTERS] + [
    ("expert_choice", {"causal_evaluation": False}),
    ("lory", {"first_segment": "own"}),
]


@pytest.mark.parametrize("first_segment", ["own", "uniform"])
def test_lory_cuts_segments_of_tokens_and_not_of_padding(first_segment):
    model = small_model("lory", first_segment=first_segment).eval()
    ids = torch.randint(64, (2, 10))
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    with torch.no_grad():
        alone, left = model(ids), model(padded, attention_mask=mask)
        torch.testing.assert_close(left.logits[:, 3:], alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            left.routings[0].gate_TE.view(2, 13, -1)[:, 3:].flatten(0, 1), alone.routings[0].gate_TE
        )
        assert not left.routings[0].gate_TE.view(2, 13, -1)[:, :3].any()


def test_lory_refuses_a_cache():
    model = small_model("lory").eval()
    with pytest.raises(ConfigError, match="'lory' works without a KV cache"):
        model.generate(torch.randint(64, (1, 6)), max_new_tokens=2, use_cache=True, pad_token_id=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [*CASES, ("relu_norm", {"penalty": "chunk"}), ("relu_norm", {"locality": 1.0})],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_no_tokens_are_no_output(name, options):
    layer = MoE(16, 32, 4, 1, router=name, router_options=options)
    y_TD, routing = layer(torch.zeros(0, 16), **({"token_ids": torch.zeros(0).long()} if name == "hash" else {}))
    assert y_TD.shape == (0, 16)
    assert routing.regularizer == 0


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}{'-' if o else ''}{''.join(o)}" for n, o in CASES])
def test_causal_means_that_a_later_token_never_changes_an_earlier_output(name, options):
    model = small_model(name, **options)
    ids = torch.randint(64, (2, 12))
    model.train()
    model(ids, labels=ids, use_cache=False)
    model.update_routing()  # cutoffs have values now
    model.eval()
    changed_early = False
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for t in range(1, 12):
            other = ids.clone()
            other[:, t] = (other[:, t] + 1 + torch.randint(63, (2,))) % 64
            after = model(other, use_cache=False).logits
            changed_early |= not torch.allclose(after[:, :t], before[:, :t], atol=1e-5)
            assert not torch.allclose(after[:, t:], before[:, t:], atol=1e-5)
    assert changed_early == (not model.model.layers[0].mlp.router.causal)


@pytest.mark.parametrize("name", list(ROUTERS))
def test_every_router_trains_saves_and_writes_text(name, tmp_path):
    model = small_model(name).train()
    ids = torch.randint(64, (2, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False)
        loss.loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        model.update_routing()
        losses.append(loss.lm_loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = remoe.RemoeForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert model.generate(ids[:, :5], max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 8)


@pytest.mark.parametrize("name", list(ROUTERS))
def test_a_loop_of_ones_own_steers_as_the_model_does(name):
    options = {"locality": 0.5} if name == "relu_norm" else {}
    model = small_model(name, **options).train()
    other = small_model(name, **options).train()
    other.load_state_dict(model.state_dict())
    control = remoe.SparsityController.of([layer.mlp for layer in other.model.layers])
    other.sparsity = control
    for step in range(3):
        ids = torch.randint(64, (2, 12))
        torch.manual_seed(step)  # "sparsemixer" draws
        expected = model(ids, labels=ids, use_cache=False)
        model.update_routing()
        torch.manual_seed(step)
        routings = other.model(ids, use_cache=False).routings
        torch.testing.assert_close(control.loss_terms(routings).total, expected.loss - expected.lm_loss)
        control.observe(routings)
        control.update()
    for (_, moved), (key, buffer) in zip(other.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(moved, buffer), key
    if name in ("expert_choice", "threshold"):  # untrained cutoffs would let everything pass
        assert all(routing.sparsity > 0 for routing in other.eval()(ids).routings)


@pytest.mark.parametrize("name", list(ROUTERS))
def test_shared_expert_is_added_for_every_token(name):
    layer = remoe.MoE(D, 8, E, 1, name, shared_expert_size=12, init_std=0.5).eval()
    x, ids = torch.randn(2, 6, D), torch.randint(100, (2, 6))
    shared, layer.shared_expert = layer.shared_expert, None
    routed = layer(x, token_ids=ids)[0]
    layer.shared_expert = shared
    whole = layer(x, token_ids=ids)[0]
    up, down = shared.gate_up_proj[0].double(), shared.down_proj[0].double()
    expected = torch.stack([reference.expert(x_D.double(), up, down) for x_D in x.view(-1, D)]).view(x.shape)
    assert reference.relative_error(whole - routed, expected) < 1e-4
    assert shared.down_proj.shape == (1, D, 12)


def test_steered_state_stays_float32_when_the_model_is_cast(tmp_path):
    for name, buffer in (("sigmoid", "bias_E"), ("threshold", "cutoff_E")):
        model = small_model(name)
        getattr(model.model.layers[0].mlp.router, buffer).fill_(0.1234567)
        model.save_pretrained(tmp_path / name)
        loaded = remoe.RemoeForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        for cast in (model.to(torch.bfloat16), loaded):
            value = getattr(cast.model.layers[0].mlp.router, buffer)
            assert value.dtype == torch.float32
            assert value[0].item() == pytest.approx(0.1234567, rel=1e-6)


def test_locality_loss_is_part_of_the_training_loss_only():
    model = small_model("relu_norm", locality=0.5).train()
    ids = torch.randint(64, (2, 12))
    out = model(ids, labels=ids, use_cache=False)
    extra = torch.stack([routing.extra_loss for routing in out.routings]).mean()
    expected = out.lm_loss + model.sparsity.lam * out.reg_loss + extra
    torch.testing.assert_close(out.loss, expected)
    assert extra > 0
    assert model.eval()(ids, labels=ids).routings[0].extra_loss is None

    classifier = remoe.RemoeForSequenceClassification(model.config).train()
    out = classifier(ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1]))
    extra = torch.stack([routing.extra_loss for routing in out.routings]).mean()
    torch.testing.assert_close(out.loss, out.task_loss + classifier.sparsity.lam * out.reg_loss + extra)
