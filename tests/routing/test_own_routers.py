"""Routers from files of the user's own."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import DynamicCache

import remoe
from remoe.errors import ConfigError
from remoe.lab.cli.main import main
from remoe.lab.export import export_run
from remoe.models.plan import flops_per_sequence, training_flops
from remoe.routing import ROUTERS, TopKRouter
from remoe.routing.options import check_options
from remoe.routing.plugins import load_own_routers

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "router.md").read_text()


@pytest.fixture
def same_routers():
    """The test leaves no router behind."""
    before = dict(ROUTERS)
    yield
    ROUTERS.clear()
    ROUTERS.update(before)


@pytest.mark.slow
@pytest.mark.usefixtures("same_routers", "forked_runs", "no_figures")
def test_compare_trains_the_router_of_the_guide(corpus, tmp_path, monkeypatch, capsys):
    examples = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    example = next(example for example in examples if "class AboveMean" in example)
    (tmp_path / "above_mean.py").write_text(example)
    base = {"steps": 2, "seq_len": 32, "batch_size": 2, "model": {"hidden_size": 32, "num_hidden_layers": 1}}
    experiment = {"base": base, "variants": {"mine": {"router": "above_mean"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(experiment))
    monkeypatch.chdir(tmp_path)
    for files, code, words in (
        ("none.py", 2, "none.py, which is not a Python"),
        ("above_mean.py", 0, "validation loss"),
    ):
        monkeypatch.setenv("REMOE_ROUTERS", files)
        assert main(["compare", "mine.yaml", "--data", str(corpus), "--device", "cpu"]) == code
        said = capsys.readouterr()
        assert words in said.out + said.err
    assert "| mine | 1 | 2 |" in (tmp_path / "runs" / "compare" / "mine" / "results.md").read_text()


OWN = """
import torch

from remoe.routing import ROUTERS, Assignment, MergedRouting, Router, Routing
from remoe.routing.dense import one_expert


class Neighbour(Router):
    \"\"\"The expert of token id + shift.\"\"\"

    needs_ids = True
    has_logits = False

    def __init__(self, d_model, num_experts, k, *, shift: int = 0):
        super().__init__(d_model, num_experts, k)
        self.shift = shift

    def forward(self, x_TD, mask_T=None, *, ids_T=None, **_):
        active_TE = torch.nn.functional.one_hot((ids_T + self.shift) % self.num_experts, self.num_experts).bool()
        if mask_T is not None:
            active_TE = active_TE & mask_T[:, None]
        gate_TE = active_TE.float()
        pairs = Assignment.from_gates(gate_TE, active_TE)
        return Routing(pairs, gate_TE, None, active_TE.any(dim=1).sum(), torch.zeros(()))


class Average(Router):
    \"\"\"One network, the mean of all experts.\"\"\"

    routes_pairs = False
    merges = True
    supports_cache = False
    has_logits = False

    def forward(self, x_TD, mask_T=None, *, seq_len=None, **_):
        one, E = one_expert(x_TD, mask_T), self.num_experts
        merge_BME = torch.full((x_TD.shape[0] // seq_len, 1, E), 1 / E)
        return MergedRouting(
            assignment=one.assignment, gate_TE=one.gate_TE / E, logits_TE=None, num_tokens=one.num_tokens,
            regularizer=one.regularizer, merge_BME=merge_BME, segment=seq_len, seq_len=seq_len,
        )

    @classmethod
    def executed_experts(cls, num_experts, k, density, seq_len, **options):
        return 1 + num_experts / seq_len


class Half(Router):
    \"\"\"Dense, half as wide as an expert.\"\"\"

    routes_pairs = False
    has_logits = False

    @classmethod
    def networks(cls, num_experts, d_ffn, k):
        return 1, d_ffn // 2

    @classmethod
    def executed_experts(cls, num_experts, k, density, seq_len, **options):
        return 0.5

    def forward(self, x_TD, mask_T=None, **_):
        return one_expert(x_TD, mask_T)


ROUTERS |= {"neighbour": Neighbour, "average": Average, "half": Half}
"""
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4}


@pytest.fixture
def own_routers(same_routers, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    load_own_routers(str(path))


def trained(**options):
    """A model that took three steps, its first and last loss."""
    torch.manual_seed(0)
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, **options)).train()
    ids = torch.randint(64, (2, 12))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_routing()
        losses.append(outputs.lm_loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


@pytest.mark.usefixtures("own_routers")
def test_a_router_of_ones_own_can_take_ids_and_options():
    model, ids = trained(router="neighbour", router_options={"shift": 3}), torch.randint(64, (2, 9))
    assert model.config.router_class.needs_ids
    outputs = model(ids, use_cache=True)
    expected_TE = torch.nn.functional.one_hot((ids.flatten() + 3) % 4, 4)
    assert all(torch.equal(routing.gate_TE, expected_TE.float()) for routing in outputs.routings)
    assert model.sparsity.sparsity == pytest.approx(0.75)
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(written, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    with pytest.raises(ConfigError, match="'neighbour' has no option 'sift'; it has: shift"):
        remoe.MoE(8, 16, 4, 1, "neighbour", router_options={"sift": 3})


@pytest.mark.usefixtures("own_routers")
def test_a_router_of_ones_own_can_merge_its_experts():
    model, ids = trained(router="average"), torch.randint(64, (2, 9))
    layer, x = model.model.layers[0].mlp, torch.randn(2, 5, 16)
    gate_up, down = (weight.mean(dim=0) for weight in (layer.experts.gate_up_proj, layer.experts.down_proj))
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x)[0], (torch.nn.functional.silu(gate) * up) @ down.T, rtol=1e-4, atol=1e-6)
    assert model(ids).get("past_key_values") is None
    with pytest.raises(ConfigError, match="'average' works without a KV cache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="'average' merges its experts"):
        remoe.quantize(model)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 11)


@pytest.mark.usefixtures("own_routers")
def test_a_router_of_ones_own_can_be_dense_and_says_what_it_costs():
    model = trained(router="half")
    assert model.model.layers[0].mlp.experts.down_proj.shape == (1, 16, 32)
    assert "layers.*.mlp.experts" not in model.config.base_model_tp_plan
    flops = {
        router: flops_per_sequence(remoe.RemoeConfig(**SIZES, router=router), 32, density=0.25)
        for router in ("half", "average", "neighbour", "dense")
    }
    expert = 6 * 32 * 2 * 3 * 16 * 64  # forward and backward of one expert's three matrices in two layers
    assert flops["neighbour"] == flops["dense"]
    assert flops["dense"] - flops["half"] == 0.5 * expert
    assert flops["average"] - flops["dense"] == pytest.approx(4 / 32 * expert)
    steps = [0.75] * 2
    runs = {r: training_flops(remoe.RemoeConfig(**SIZES, router=r), 32, 64, steps) for r in ("neighbour", "topk")}
    assert runs["topk"] - runs["neighbour"] == 2 * 64 * 6 * 2 * 16 * 4  # the router's own product


def test_options_of_types_of_ones_own_are_passed_on():
    class Sized(TopKRouter):
        def __init__(self, *shape, sizes: list[int] = (), **options):
            super().__init__(*shape, **options)
            self.sizes = sizes

    check_options("sized", Sized, {"sizes": [1, 2], "renormalize": True})
    with pytest.raises(ConfigError, match="renormalize must be true or false"):
        check_options("sized", Sized, {"renormalize": [1]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module"),
        ("def f(", "SyntaxError"),
        ("", "puts no router"),
    ],
)
def test_a_file_that_does_not_work_is_named(text, words, tmp_path):
    path = tmp_path / "statistics.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_own_routers(str(path))
    assert "fmean" in dir(importlib.import_module("statistics"))  # no module of another is replaced
    with pytest.raises(ConfigError, match="is not a Python file"):
        load_own_routers(str(tmp_path))


def test_a_router_of_ones_own_is_not_exported(monkeypatch, corpus, tmp_path):
    monkeypatch.setitem(ROUTERS, "mine", type("Mine", (TopKRouter,), {"__module__": "mine"}))
    small = ["--steps", "1", "--seq-len", "32", "--batch-size", "1", "--model.hidden-size", "32"]
    run = ["--out", str(tmp_path / "run"), "--data", str(corpus), "--router", "mine"]
    assert main(["train", *run, *small, "--model.num-hidden-layers", "1"]) == 0
    with pytest.raises(ConfigError, match="router 'mine' is not of this package"):
        export_run(tmp_path / "run", tmp_path / "exported")
