"""The dial's numbers are those of a model that was set so, and the model is afterwards what it was."""

from pathlib import Path

import pytest
import torch
from common_models import build
from tiny_models import build as build_theirs
from torch.nn import functional as F

from remoe.errors import ConfigError
from remoe.lab.analysis.dial import SHARES, measure_dial
from remoe.lab.analysis.mixture import Mixture
from remoe.lab.analysis.source import Source
from remoe.lab.analysis.texts import GIVEN, TokenIds

TOKENS = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def source_of(model):
    return Source(model, Mixture(model), None, Path("model"), None, TokenIds(TOKENS), None)


def loss_and_active(model, **dial):
    with torch.no_grad():
        out = model(TOKENS, use_cache=False, **dial)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    pairs = torch.stack([routing.count_E for routing in out.routings]).sum()
    return loss.item(), pairs.item() / TOKENS.numel() / len(out.routings)


@pytest.mark.parametrize("own", [None, 3])
def test_points_are_those_of_the_model_with_this_threshold_or_cap(own):
    model = build(max_experts=own)
    model.set_gate_threshold(0.01)
    model.set_max_experts(2)
    found = measure_dial(source_of(model), [GIVEN], 1000)
    assert found.tokens == TOKENS.numel()
    assert [layer.mlp.gate_threshold for layer in model.model.layers] == [0.01] * 3
    assert [layer.mlp.max_experts for layer in model.model.layers] == [2] * 3
    trained = loss_and_active(model, gate_threshold=0.0, max_experts=4)
    for point in found.threshold:
        loss, active = loss_and_active(model, gate_threshold=point.setting, max_experts=4)
        assert (point.loss, point.active) == pytest.approx((loss, active), rel=1e-5)
    assert [point.setting for point in found.cap] == ([1, 2, 3] if own else [1, 2, 4])
    for point in found.cap:
        loss, active = loss_and_active(model, gate_threshold=0.0, max_experts=int(point.setting))
        assert (point.loss, point.active) == pytest.approx((loss, active), rel=1e-5)
    for point in (found.threshold[0], found.cap[-1]):
        assert (point.loss, point.active) == pytest.approx(trained, rel=1e-5)
    left = [1 - point.active / trained[1] for point in found.threshold]
    # a pair that is left out changes later layers: shares are met in the first of three
    assert left[0] == 0
    assert left[1:] == pytest.approx(SHARES, abs=0.15)
    assert all(point.tokens_per_second > 0 for point in (*found.threshold, *found.cap))


def test_a_model_of_another_type_has_no_dial():
    with pytest.raises(ConfigError, match="need a model of remoe's own type"):
        measure_dial(source_of(build_theirs("mixtral")), [GIVEN], 10)
