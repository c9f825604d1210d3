"""Checkpoints of the authors' Megatron code: read in every split and format, written and read again, never executed.

`write_rank_files` builds one by the names and shapes of their modules, in plain loops of its own.
"""

import itertools
import os
from argparse import Namespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import token_ids

import remoe
from remoe.errors import ConfigError

SPLITS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (2, 2, 2)]
LAYOUTS = ("te_grouped", "grouped", "sequential")
D, F, HEADS, GROUPS, WIDTH, VOCAB, LAYERS = 32, 48, 4, 2, 8, 64, 2


def tiny(**options):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "num_experts": 4,
        "initializer_range": 0.2,
        "max_position_embeddings": 64,
        "regularizer_normalization": "official",
        "sparsity": {"rule": "official"},
    }
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**(sizes | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.sparsity.lam.fill_(3.5e-4)
    return model


def arguments(granularity=1, **options):
    known = {
        "num_layers": LAYERS,
        "hidden_size": D,
        "ffn_hidden_size": F,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "max_position_embeddings": 64,
        "rotary_base": 1_000_000,
        "norm_epsilon": 1e-5,
        "untie_embeddings_and_output_weights": True,
        "num_experts": 4,
        "moe_router_topk": 1,
        "moe_granularity": granularity,
        "moe_relu_routing": True,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
    }
    return Namespace(**(known | options))


def qkv_of(state, layer):
    """Megatron's rows: for each group its query heads, then its key, then its value."""
    q, k, v = (state[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
    rows = []
    for group in range(GROUPS):
        for head in range(HEADS // GROUPS):
            start = (group * (HEADS // GROUPS) + head) * WIDTH
            rows.append(q[start : start + WIDTH])
        rows += [k[group * WIDTH : (group + 1) * WIDTH], v[group * WIDTH : (group + 1) * WIDTH]]
    return torch.cat(rows)


def rank_state(model, layout, t, tp, p, pp, e, ep, fused_norm):
    """One rank's `model`, by the modules' documented shapes."""
    full = model.state_dict()
    experts = full["model.layers.0.mlp.experts.down_proj"].shape[0]
    width = full["model.layers.0.mlp.experts.down_proj"].shape[2]
    own_f = slice(t * width // tp, (t + 1) * width // tp)
    state = {"moe_relu_l1_reg_coeff": model.sparsity.lam.clone()}
    vocab = slice(t * VOCAB // tp, (t + 1) * VOCAB // tp)
    if p == 0:
        state["embedding.word_embeddings.weight"] = full["model.embed_tokens.weight"][vocab].clone()
    if p == pp - 1:
        state["output_layer.weight"] = full["lm_head.weight"][vocab].clone()
        state["decoder.final_layernorm.weight"] = full["model.norm.weight"]
    for local in range(LAYERS // pp):
        layer = local + p * LAYERS // pp
        old, new = f"model.layers.{layer}.", f"decoder.layers.{local}."
        norm = "self_attention.linear_qkv.layer_norm_weight" if fused_norm else "input_layernorm.weight"
        state[new + norm] = full[old + "input_layernorm.weight"]
        state[new + "pre_mlp_layernorm.weight"] = full[old + "post_attention_layernorm.weight"]
        qkv = qkv_of(full, layer)
        rows = len(qkv) // tp
        state[new + "self_attention.linear_qkv.weight"] = qkv[t * rows : (t + 1) * rows].clone()
        proj = full[old + "self_attn.o_proj.weight"]
        columns = proj.shape[1] // tp
        state[new + "self_attention.linear_proj.weight"] = proj[:, t * columns : (t + 1) * columns].clone()
        state[new + "self_attention.linear_proj._extra_state"] = None
        state[new + "mlp.router.weight"] = full[old + "mlp.router.weight"]
        fc1, fc2 = [], []
        for expert in range(e * experts // ep, (e + 1) * experts // ep):
            gate_up = full[old + "mlp.experts.gate_up_proj"][expert]
            gate, up = gate_up[:width], gate_up[width:]
            fc1.append(torch.cat([gate[own_f], up[own_f]]))
            fc2.append(full[old + "mlp.experts.down_proj"][expert][:, own_f])
        prefix = new + "mlp.experts."
        if layout == "grouped":
            # Their forward pass views weight1 as (experts, D, 2 F) and weight2 as (experts, F, D).
            state[prefix + "weight1"] = torch.stack([w.T for w in fc1]).reshape(D, -1)
            state[prefix + "weight2"] = torch.stack([w.T for w in fc2]).reshape(-1, D)
        else:
            for i, (w1, w2) in enumerate(zip(fc1, fc2, strict=True)):
                for linear, weight in (("linear_fc1", w1), ("linear_fc2", w2)):
                    name = f"local_experts.{i}.{linear}.weight" if layout == "sequential" else f"{linear}.weight{i}"
                    state[prefix + name] = weight.clone()
    return state


def write_rank_files(model, folder, layout="te_grouped", tp=1, pp=1, ep=1, fused_norm=True, args=None, extra=None):
    args = args or arguments(
        granularity=model.config.granularity,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    for t, p, e in itertools.product(range(tp), range(pp), range(ep)):
        name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
        path = folder / "iter_0000040" / name
        path.mkdir(parents=True)
        state = rank_state(model, layout, t, tp, p, pp, e, ep, fused_norm) | (extra or {})
        data = {"args": args, "checkpoint_version": 3.0, "iteration": 40, "model": state}
        torch.save(data, path / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("40")


def assert_same(loaded, model):
    ids = token_ids(2)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.sparsity.lam == model.sparsity.lam
    assert loaded.sparsity.target == model.sparsity.target


@pytest.mark.parametrize(("tp", "pp", "ep"), SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_split_is_joined(layout, tp, pp, ep, tmp_path):
    model = tiny(granularity=2)
    write_rank_files(model, tmp_path, layout, tp, pp, ep)
    assert_same(remoe.load_megatron(tmp_path), model)


def test_megatrons_own_modules_name_the_norm_otherwise(tmp_path):
    model = tiny()
    write_rank_files(model, tmp_path, "sequential", fused_norm=False)
    assert_same(remoe.load_megatron(tmp_path, iteration=40), model)
    assert_same(remoe.load_megatron(tmp_path / "iter_0000040"), model)


def test_the_config_is_the_checkpoints(tmp_path):
    model = tiny(granularity=2)
    write_rank_files(model, tmp_path)
    config = remoe.load_megatron(tmp_path, backend="loop").config
    assert (config.num_experts, config.granularity, config.intermediate_size) == (4, 2, F)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert (config.regularizer_normalization, config.sparsity["rule"]) == ("official", "official")
    assert config.backend == "cpu"


def test_lambda_goes_on_where_it_was(tmp_path):
    model = tiny()
    write_rank_files(model, tmp_path)
    loaded = remoe.load_megatron(tmp_path).train()
    ids = token_ids(2)
    loaded(input_ids=ids, labels=ids).loss.backward()
    loaded.update_routing()
    factor = (loaded.sparsity.lam / model.sparsity.lam).item()
    assert factor == pytest.approx(1.2) or factor == pytest.approx(1 / 1.2)


def test_torch_dist_is_read(tmp_path):
    """Whole tensors by name, experts stacked, plain buffers and arguments in common.pt."""
    model = tiny()
    state = rank_state(model, "te_grouped", 0, 1, 0, 1, 0, 1, fused_norm=True)
    lam = state.pop("moe_relu_l1_reg_coeff")
    tensors = {}
    for name, value in state.items():
        if ".mlp.experts." not in name and value is not None:
            tensors[name] = value
    for i in range(LAYERS):
        prefix = f"decoder.layers.{i}.mlp.experts."
        for linear in ("linear_fc1", "linear_fc2"):
            stacked = torch.stack([state[f"{prefix}{linear}.weight{j}"] for j in range(4)])
            tensors[f"{prefix}experts.{linear}.weight"] = stacked
    tensors["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(VOCAB, D)
    path = tmp_path / "iter_0000040"
    dcp.save(tensors, checkpoint_id=path, no_dist=True)
    torch.save({"args": arguments(), "iteration": 40, "moe_relu_l1_reg_coeff": lam}, path / "common.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    assert_same(remoe.load_megatron(tmp_path), model)
    for shard in path.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        remoe.load_megatron(tmp_path)
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-100])
    with pytest.raises(ConfigError, match="metadata cannot be read"):
        remoe.load_megatron(tmp_path)


@pytest.mark.parametrize(("tp", "pp", "ep"), SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_files_are_the_documented_ones(layout, tp, pp, ep, tmp_path):
    model = tiny(granularity=2)
    written = remoe.save_megatron(
        model, tmp_path, iteration=40, tensor_parallel=tp, pipeline_parallel=pp, expert_parallel=ep, experts=layout
    )
    files = sorted(written.glob("*/model_optim_rng.pt"))
    assert len(files) == tp * pp * ep
    for path in files:
        ranks = [int(part) for part in path.parent.name.split("_")[2:]]
        t, rest = ranks[0], ranks[1:]
        p = rest.pop(0) if pp > 1 else 0
        e = rest.pop(0) if ep > 1 else 0
        expected = rank_state(model, layout, t, tp, p, pp, e, ep, fused_norm=True)
        with torch.serialization.safe_globals([Namespace]):
            state = torch.load(path, weights_only=True)["model"]
        found = {name for name, value in state.items() if value is not None}
        assert found == {name for name, value in expected.items() if value is not None}
        assert all(torch.equal(state[name], expected[name]) for name in found)


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"qk_norm": True}, {"shared_expert_size": 24}])
def test_there_and_back(options, tmp_path):
    model = tiny(**options).bfloat16()
    remoe.save_megatron(model, tmp_path, tensor_parallel=2, expert_parallel=2)
    again = remoe.load_megatron(tmp_path)
    assert again.dtype == torch.bfloat16
    assert_same(again, model)


def test_the_penalty_is_written_as_their_sum_over_layers(tmp_path):
    model = tiny(regularizer_normalization="paper", sparsity={"lambda_init": 1e-3})
    model.sparsity.lam.fill_(0.5)
    remoe.save_megatron(model, tmp_path)
    again = remoe.load_megatron(tmp_path)
    assert again.config.sparsity["lambda_init"] == pytest.approx(1e-3 / model.config.num_hidden_layers)
    ids = token_ids(2)
    penalties = [m.sparsity.loss_terms(m(ids).routings).total for m in (model.eval(), again)]
    torch.testing.assert_close(*penalties)


def test_the_penalty_is_read_as_the_mean_over_layers_where_asked(tmp_path):
    write_rank_files(tiny(), tmp_path)
    theirs, ours = (remoe.load_megatron(tmp_path, regularizer_normalization=n) for n in ("official", "paper"))
    torch.testing.assert_close(ours.sparsity.lam, theirs.sparsity.lam * LAYERS)
    assert ours.config.sparsity["lambda_init"] == pytest.approx(theirs.config.sparsity["lambda_init"] * LAYERS)
    ids = token_ids(2)
    penalties = [m.sparsity.loss_terms(m(ids).routings).total for m in (theirs, ours)]
    torch.testing.assert_close(*penalties)
    given = {"regularizer_normalization": "paper", "sparsity": {"lambda_init": 0.125}}
    assert remoe.load_megatron(tmp_path, **given).config.sparsity["lambda_init"] == 0.125


def test_a_bfloat16_checkpoint_has_exact_rotary_frequencies(tmp_path):
    model = tiny()
    remoe.save_megatron(tiny().bfloat16(), tmp_path)
    again = remoe.load_megatron(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_an_option_that_does_not_exist_is_named(tmp_path):
    write_rank_files(tiny(), tmp_path)
    with pytest.raises(ConfigError, match="RemoeConfig has no lamda_alpha"):
        remoe.load_megatron(tmp_path, lamda_alpha=3)
    model = remoe.load_megatron(tmp_path, attn_implementation="eager", num_labels=3)  # transformers' own
    assert (model.config._attn_implementation, model.config.num_labels) == ("eager", 3)


class Harm:
    def __reduce__(self):
        return os.mkdir, (os.environ["REMOE_TEST_HARM"],)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("REMOE_TEST_HARM", str(tmp_path / "harm"))
    model = tiny()
    write_rank_files(model, tmp_path, args=arguments(attention_backend=Harm()), extra={"x._extra_state": Harm()})
    assert_same(remoe.load_megatron(tmp_path), model)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe_relu_routing": False}, "moe_relu_routing = False"),
        ({"swiglu": False}, "swiglu = False"),
        ({"expert_tensor_parallel_size": 2}, "expert_tensor_parallel_size"),
        ({"hidden_size": 64}, "hidden_size is 64 .* 32 by its embedding"),
        ({"num_query_groups": 4}, r"linear_qkv\.weight has 64 rows, not 4 x 3 x 8"),
        ({"num_layers": 3}, r"nothing for model\.layers\.2"),
        ({"ffn_hidden_size": 40}, r"gate_up_proj is \(4, 80, 32\) by the arguments, \(4, 96, 32\)"),
    ],
)
def test_other_models_are_refused_by_name(options, message, tmp_path):
    write_rank_files(tiny(), tmp_path, args=arguments(**options))
    with pytest.raises(ConfigError, match=message):
        remoe.load_megatron(tmp_path)


def test_incomplete_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="latest_checkpointed_iteration"):
        remoe.load_megatron(tmp_path)
    write_rank_files(tiny(), tmp_path, tp=2)
    with pytest.raises(ConfigError, match="no folder"):
        remoe.load_megatron(tmp_path, iteration=3)
    path = tmp_path / "iter_0000040" / "mp_rank_01" / "model_optim_rng.pt"
    path.unlink()
    with pytest.raises(ConfigError, match=r"incomplete.*mp_rank_01"):
        remoe.load_megatron(tmp_path)
    path.write_text("no checkpoint")
    with pytest.raises(ConfigError, match=r"mp_rank_01.*no file of torch\.save"):
        remoe.load_megatron(tmp_path)


def test_a_tensor_without_counterpart_is_named(tmp_path):
    write_rank_files(tiny(), tmp_path, extra={"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(4, D)})
    with pytest.raises(ConfigError, match=r"decoder\.layers\.0\.mlp\.linear_fc1\.weight has no counterpart"):
        remoe.load_megatron(tmp_path)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"router": "topk"}, {}, "router 'topk'"),
        ({"load_balance": False}, {}, "load_balance"),
        ({}, {"tensor_parallel": 4}, "num_key_value_heads"),
        ({}, {"expert_parallel": 3}, "number of experts"),
        ({}, {"experts": "legacy"}, "te_grouped"),
    ],
)
def test_what_cannot_be_written_is_named(model, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        remoe.save_megatron(tiny(**model), tmp_path, **options)
