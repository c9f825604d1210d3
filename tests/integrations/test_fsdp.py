"""FullyShardedDataParallel casts buffers too: lambda, steered state and rotary frequencies keep their exact values."""

import pytest
import torch
from ranks import run_ranks
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

import remoe

LAMBDA, ALPHA, STEPS = 1e-3, 1.001, 3
MIXED = MixedPrecision(*[torch.bfloat16] * 3)  # parameters, gradients and, as accelerate has it, buffers

pytestmark = pytest.mark.slow


def model(router):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 4}
    config = remoe.RemoeConfig(
        **sizes, num_attention_heads=2, router=router, sparsity={"lambda_init": LAMBDA, "alpha": ALPHA}
    )
    return remoe.RemoeForCausalLM(config)


def batch(rank):
    return torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(rank))


def _train(rank, folder):
    for router in ("relu", "sigmoid"):
        inner = model(router)
        wrapped = FullyShardedDataParallel(
            inner, mixed_precision=MIXED, device_id=torch.device("cpu"), use_orig_params=True
        )
        optimizer, record = torch.optim.SGD(wrapped.parameters(), lr=0.01), []
        for _ in range(STEPS):
            wrapped(batch(rank), labels=batch(rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            inner.update_routing()
            record.append((inner.sparsity.lam.clone(), inner.sparsity.sparsity.clone()))
        buffers = {name: buffer for name, buffer in inner.named_buffers() if buffer.is_floating_point()}
        torch.save({"record": record, "buffers": buffers}, folder / f"{router}-{rank}.pt")


def test_what_is_steered_stays_float32(tmp_path):
    run_ranks(_train, tmp_path)
    for router in ("relu", "sigmoid"):
        one, two = (torch.load(tmp_path / f"{router}-{rank}.pt", weights_only=True) for rank in range(2))
        assert {buffer.dtype for buffer in one["buffers"].values()} == {torch.float32}
        frequencies = "model.rotary_emb.inv_freq"
        assert torch.equal(one["buffers"][frequencies], dict(model(router).named_buffers())[frequencies])
        assert one["record"] == two["record"]
        expected = LAMBDA
        for lam, sparsity in one["record"] if router == "relu" else ():
            expected *= ALPHA if sparsity < 0.75 else 1 / ALPHA
            assert lam.item() == pytest.approx(expected, rel=1e-6)
    bias = one["buffers"]["model.layers.0.mlp.router.bias_E"]
    moves = (bias / 0.001).round()  # the step of loss-free balancing; bfloat16 has no such multiples
    assert moves.any()
    torch.testing.assert_close(bias, moves * 0.001, rtol=1e-5, atol=0)


@pytest.mark.parametrize("written", [False, True])
def test_a_cast_of_the_data_is_taken_back(written):
    controller = remoe.SparsityController(2, 4, 1, lambda_init=0.1)
    controller.lam.data = controller.lam.to(torch.bfloat16)
    if written:
        controller.lam.fill_(0.375)
    controller.train()
    assert controller.lam.dtype is torch.float32
    assert controller.lam.item() == (0.375 if written else torch.tensor(0.1).item())
    controller.lam.mul_(2)  # and its memory is kept from now on
    controller.lam.data = controller.lam.to(torch.float16)
    controller.keep_float32()
    assert controller.lam.item() == 2 * (0.375 if written else torch.tensor(0.1).item())
