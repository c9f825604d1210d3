"""transformers' tensor parallelism over two processes: logits, gradients and a step are those of one process."""

import pytest
import torch
from ranks import run_ranks

import remoe

pytestmark = pytest.mark.slow

transformers_distributed = pytest.importorskip("transformers.distributed")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "initializer_range": 0.2,
    "sparsity": {"lambda_init": 0.01},
    "shared_expert_size": 16,
}


def token_ids():
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def step(model):
    """Logits, and every gradient of one training step."""
    ids = token_ids()
    with torch.no_grad():
        logits = model.eval()(ids).logits
    model.train()(ids, labels=ids).loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    model.update_routing()
    return {"logits": logits, "gradients": gradients, "lam": model.sparsity.lam, "sparsity": model.sparsity.sparsity}


def work(rank, folder):
    config = transformers_distributed.DistributedConfig(tp_size=2, tp_plan="auto")
    model = remoe.RemoeForCausalLM.from_pretrained(folder, distributed_config=config)
    local = model.model.layers[0].mlp.experts.down_proj
    local = local.to_local() if hasattr(local, "to_local") else local
    result = step(model) | {"local": tuple(local.shape)}
    if rank == 0:
        torch.save(result, folder / "result.pt")


gathers_gradients = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch 2.11 cannot gather the gradient of two projections in one weight"
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=gathers_gradients),
        pytest.param({"qk_norm": True, "router": "topk"}, marks=gathers_gradients),
        {"router": "dense"},
        pytest.param({"tie_word_embeddings": True}, marks=gathers_gradients),
    ],
)
def test_two_processes_compute_what_one_does(options, tmp_path):
    torch.manual_seed(0)
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, **options))
    model.save_pretrained(tmp_path)
    expected = step(remoe.RemoeForCausalLM.from_pretrained(tmp_path))
    run_ranks(work, tmp_path)
    result = torch.load(tmp_path / "result.pt")
    assert result["local"][-1] == (128 if options.get("router") == "dense" else 64)
    for key in ("logits", "lam", "sparsity"):
        torch.testing.assert_close(result[key], expected[key], rtol=1e-4, atol=1e-5)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
