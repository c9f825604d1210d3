"""A model whose layers lie on two devices, as `device_map` spreads them, on fake tensors, which have no memory.

Passes through the layers are transformers' and accelerate's matter; ours is what comes of their routings.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import remoe
from remoe.models.modeling_remoe import RemoeModelOutput
from remoe.routing.assignment import Assignment, Routing

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
B, S, E = 2, 9, 4
FIRST, LAST = "lazy:0", "lazy:1"  # a type that a PyTorch without GPUs has twice


def routing(device, extra_loss=False):
    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device=device)

    gate_TE, count_E = zeros(B * S, E), zeros(E, dtype=torch.int64)
    pairs = Assignment(count_E, count_E, zeros(E), count_E, B * S)
    extra = zeros(()) if extra_loss else None
    return Routing(pairs, gate_TE, gate_TE, count_E.sum(), zeros(()), extra, statistic_E=zeros(E))


def spread(cls, router="relu"):
    """A model that is on the last device but for its first layer's router; its transformer gives routings of both."""
    model = cls(remoe.RemoeConfig(**SIZES, router=router, pad_token_id=0))
    for module in model.modules():
        device = FIRST if module is model.model.layers[0].mlp.router else LAST
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, device=device))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    extra = router == "relu_norm"
    hidden_BSD = torch.zeros(B, S, 32, device=LAST)
    routings = (routing(FIRST, extra), routing(LAST, extra))
    model.model.forward = lambda **_: RemoeModelOutput(last_hidden_state=hidden_BSD, routings=routings)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ["relu", "relu_norm", "topk", "sigmoid", "threshold"])
def test_a_language_model_on_two_devices(router, training):
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model = spread(remoe.RemoeForCausalLM, router).train(training)
        ids = torch.ones(B, S, dtype=torch.int64, device=FIRST)
        for options in ({}, {"num_items_in_batch": torch.ones((), device=FIRST)}, {"num_tokens_in_batch": 5}):
            loss = model(
                ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False, return_logits=True, **options
            ).loss
            assert loss.device == torch.device(LAST)
        model.update_routing()


@pytest.mark.parametrize("mask", [False, True])
def test_a_classifier_on_two_devices(mask):
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model = spread(remoe.RemoeForSequenceClassification).train()
        ids = torch.ones(B, S, dtype=torch.int64, device=FIRST)
        options = {"attention_mask": torch.ones_like(ids)} if mask else {}
        labels = torch.ones(B, dtype=torch.int64, device=LAST)
        assert model(ids, labels=labels, use_cache=False, **options).loss.device == torch.device(LAST)
