"""The loss without logits: its figures, its gradients, and when the model uses it."""

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

import remoe
from remoe.models import loss as module
from remoe.models.loss import LossHead, linear_cross_entropy


@pytest.fixture(params=[1, 16, 63, 1000], ids=lambda t: f"{t} tokens a chunk")
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", {"cpu": 0})
    monkeypatch.setattr(module, "CHUNK_TOKENS", request.param)


def problem(T=63, D=60, V=97, dtype=torch.float32, ignored=0.3):
    hidden_TD = torch.randn(T, D, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(V, D, dtype=dtype).mul_(0.5).requires_grad_()
    target_T = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < ignored, -100)
    return hidden_TD, weight_VD, target_T


def exact(hidden_TD, weight_VD, target_T, scale=1.0):
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden_TD, weight_VD)]
    loss = F.cross_entropy(F.linear(*leaves), target_T, reduction="sum") * scale
    loss.backward()
    return loss, [leaf.grad for leaf in leaves]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_loss_and_gradients(ignored):
    hidden_TD, weight_VD, target_T = problem(ignored=ignored)
    expected, grads = exact(hidden_TD, weight_VD, target_T, scale=0.37)
    poison = torch.full((1_000_000,), torch.nan)  # freed memory that may come back as "empty"
    del poison
    loss = linear_cross_entropy(hidden_TD, weight_VD, target_T) * 0.37
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for leaf, grad in zip((hidden_TD, weight_VD), grads, strict=True):
        assert leaf.grad.is_contiguous()
        if ignored == 1.0:
            assert not leaf.grad.any()
        else:
            assert reference.relative_error(leaf.grad, grad) < 1e-5


@pytest.mark.usefixtures("chunk")
def test_gradcheck():
    hidden_TD, weight_VD, target_T = problem(17, 5, 11, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, target_T), (hidden_TD, weight_VD))


def test_one_operand_alone_can_want_a_gradient():
    hidden_TD, weight_VD, target_T = problem()
    _, (dhidden, dweight) = exact(hidden_TD, weight_VD, target_T)
    linear_cross_entropy(hidden_TD, weight_VD.detach(), target_T).backward()
    linear_cross_entropy(hidden_TD.detach(), weight_VD, target_T).backward()
    assert reference.relative_error(hidden_TD.grad, dhidden) < 1e-5
    assert reference.relative_error(weight_VD.grad, dweight) < 1e-5
    with torch.no_grad():
        assert not linear_cross_entropy(hidden_TD, weight_VD, target_T).requires_grad


def test_backward_twice_adds_up():
    hidden_TD, weight_VD, target_T = problem()
    _, (dhidden, dweight) = exact(hidden_TD, weight_VD, target_T)
    loss = linear_cross_entropy(hidden_TD, weight_VD, target_T)
    loss.backward(retain_graph=True)
    loss.backward()
    assert reference.relative_error(hidden_TD.grad, 2 * dhidden) < 1e-5
    assert reference.relative_error(weight_VD.grad, 2 * dweight) < 1e-5


def test_confident_and_hopeless_predictions_stay_finite():
    """Probabilities of wanted tokens down to exp(-2e4), which float32 cannot hold: their loss must not be infinite."""
    weight_VD = torch.eye(8).mul_(100).requires_grad_()
    hidden_TD = torch.eye(8).mul_(200).requires_grad_()
    target_T = torch.tensor([0, 1, 2, 3, 5, 4, 7, 6])
    expected, _ = exact(hidden_TD, weight_VD, target_T)
    loss = linear_cross_entropy(hidden_TD, weight_VD, target_T)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.isfinite(hidden_TD.grad).all()


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 operands", "autocast"])
def test_bfloat16_products_float32_softmax(autocast):
    hidden_TD, weight_VD, target_T = problem()
    expected, grads = exact(hidden_TD, weight_VD, target_T)
    dtype = torch.float32 if autocast else torch.bfloat16
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (hidden_TD, weight_VD)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(*leaves, target_T)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.grad.dtype == dtype
        assert reference.relative_error(leaf.grad, grad) < 2e-2


def test_a_mean_over_targets_scales_gradients_in_bfloat16_as_in_float32():
    hidden_TD, weight_VD, target_T = problem()
    hidden_TD = hidden_TD.detach().bfloat16().requires_grad_()
    whole, mean = (
        torch.autograd.grad(linear_cross_entropy(hidden_TD, weight_VD.detach().bfloat16(), target_T) / n, hidden_TD)[0]
        for n in (1, 3000)
    )
    whole, mean = whole.double(), mean.double()
    ratio = (whole * mean).sum() / whole.square().sum()
    assert 3000 * ratio.item() == pytest.approx(1, rel=5e-4)  # 1 / 3000 in bfloat16 is 0.14 % too large


def test_two_runs_are_bitwise_equal():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        hidden_TD, weight_VD, target_T = problem(T=2000)
        loss = linear_cross_entropy(hidden_TD, weight_VD, target_T)
        loss.backward()
        results.append((loss.detach(), hidden_TD.grad, weight_VD.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_registration():
    """Shapes, aliases and derivative, as torch.compile sees them, agree with what runs."""
    hidden_TD, weight_VD, target_T = problem()
    for wanted in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(module._forward, (hidden_TD, weight_VD, target_T, *wanted))


# The model ---------------------------------------------------------------------------------------------------------


def model(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**{**sizes, "initializer_range": 0.2, **options})).train()


def tokens(batch=3, length=21):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_are_returned_except_for_a_loss_in_training_mode():
    ours, ids = model(), tokens()
    assert ours(ids, labels=ids).logits is None
    assert ours(ids, shift_labels=ids).logits is None
    assert ours(ids, labels=ids, return_logits=True).logits.shape == (3, 21, 97)
    assert ours(ids).logits.shape == ours(ids, return_logits=False).logits.shape == (3, 21, 97)
    ours.eval()
    assert ours(ids, labels=ids).logits.shape == (3, 21, 97)
    assert ours(ids, labels=ids, return_logits=False).logits is None


@pytest.mark.parametrize("items", [None, 100, torch.tensor(100)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_both_ways_to_the_loss_agree(tied, items):
    ids = tokens()
    ids[0, :5] = 0
    labels = ids.masked_fill(ids == 0, -100)
    results = []
    for logits in (True, False):
        ours = model(tie_word_embeddings=tied)
        out = ours(ids, labels=labels, num_items_in_batch=items, return_logits=logits)
        out.loss.backward()
        results.append((out.loss.detach(), dict(ours.named_parameters())))
    torch.testing.assert_close(results[1][0], results[0][0])
    for name, parameter in results[1][1].items():
        torch.testing.assert_close(parameter.grad, results[0][1][name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_loss_function_of_the_user_is_called():
    ours, ids = model(), tokens()
    seen = []

    def loss_function(logits, labels, vocab_size, **kwargs):
        seen.append(logits.shape)
        return logits.square().mean()

    ours.loss_function = loss_function
    out = ours(ids, labels=ids)
    assert seen == [(3, 21, 97)]
    assert out.lm_loss == out.logits.square().mean()


class _Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) * 2


def test_an_adapter_or_a_hook_on_the_head_is_not_passed_by():
    ids = tokens()
    adapted, hooked, sharded = model(), model(), model()
    plain_loss = model()(ids, labels=ids).lm_loss
    adapted.lm_head = _Adapter(adapted.lm_head)
    sharded.lm_head.__class__ = LossHead
    for ours in (hooked, sharded):
        ours.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    losses = [ours(ids, labels=ids).lm_loss for ours in (adapted, hooked, sharded)]
    assert losses[0] == losses[1] == losses[2] != plain_loss


def test_a_head_that_computes_the_loss_gives_the_same_and_is_called():
    ids, plain, ours, calls = tokens(), model(tokenizer_size=90), model(tokenizer_size=90), []
    ours.lm_head.__class__ = LossHead
    ours.lm_head.register_forward_hook(lambda *_: calls.append("called"))
    ours.lm_head.own_hooks = 1  # as FSDP's
    results = []
    for each in (plain, ours):
        out = each(ids, labels=ids.clamp(max=89))
        out.loss.backward()
        assert out.logits is None
        results.append((out.loss.detach(), each.lm_head.weight.grad))
    assert calls == ["called"]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_compiled_without_graph_break():
    hidden_TD, weight_VD, target_T = problem()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected, grads = exact(hidden_TD, weight_VD, target_T)
    loss = compiled(hidden_TD, weight_VD, target_T)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for leaf, grad in zip((hidden_TD, weight_VD), grads, strict=True):
        assert reference.relative_error(leaf.grad, grad) < 1e-5


def test_transformers_trainer_trains_without_logits_and_evaluates_with_them(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    ids = tokens(batch=6)
    data = [{"input_ids": row, "labels": row} for row in ids]
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    ours = model()
    trainer = Trainer(ours, arguments, train_dataset=data, eval_dataset=data, compute_metrics=compute_metrics)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert seen == [(6, 21, 97)] * 2


def test_second_derivatives_are_refused():
    hidden_TD, weight_VD, target_T = problem()
    hidden_TD.requires_grad_()
    loss = linear_cross_entropy(hidden_TD, weight_VD, target_T).sin()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, hidden_TD, create_graph=True)


@pytest.mark.parametrize("kernels", [True, False])
def test_large_and_undefined_logits(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(module, "compiled_kernels", lambda dtype: None)
    logits_tV = torch.tensor([[1e4, 0, -1e4, 3], [200, -200, 200, 0], [0, torch.nan, 0, 0]])
    nats_t1, dlogits_tV = module._cross_entropy(logits_tV.clone(), torch.tensor([[3], [0], [1]]))
    expected_t = F.cross_entropy(logits_tV, torch.tensor([3, 0, 1]), reduction="none")
    torch.testing.assert_close(nats_t1[:, 0], expected_t, equal_nan=True)
    expected_tV = logits_tV.softmax(dim=1) - F.one_hot(torch.tensor([3, 0, 1]), 4)
    torch.testing.assert_close(dlogits_tV, expected_tV, equal_nan=True)


@pytest.mark.parametrize("target", [5, -1])
def test_a_target_outside_of_the_vocabulary_is_refused(target):
    with pytest.raises((IndexError, RuntimeError), match=r"vocabulary|out of bounds"):
        linear_cross_entropy(torch.ones(3, 2), torch.ones(5, 2), torch.tensor([0, target, 4]))
