"""Weights in 4 bits: the format by plain loops, its error, and experts that run them."""

import pytest
import torch

from remoe.errors import ConfigError
from remoe.experts import Experts, is_quantised
from remoe.experts.packed import BYTES, GROUP, pack, unpack
from remoe.routing import Assignment


def by_hand(packed_row):
    """A row's numbers, from its bytes one by one."""
    numbers = []
    for start in range(0, len(packed_row), 20):
        block = bytes(packed_row[start : start + 20].tolist())
        scale, least = (torch.frombuffer(bytearray(block[i : i + 2]), dtype=torch.bfloat16).item() for i in (0, 2))
        low, high = [byte & 15 for byte in block[4:]], [byte >> 4 for byte in block[4:]]
        numbers += [least + scale * code for code in (*low, *high)]
    return torch.tensor(numbers)


@pytest.mark.parametrize("size", [1e-6, 0.02, 300.0])
def test_packed_weights_are_near_and_read_as_the_format_says(size):
    torch.manual_seed(0)
    weight = size * torch.randn(3, 5, 3 * GROUP)
    packed = pack(weight)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 5, 3 * BYTES))
    read = unpack(packed, torch.float32)
    torch.testing.assert_close(read[1, 2], by_hand(packed[1, 2]))
    group = weight.unflatten(-1, (-1, GROUP))
    span = (group.amax(dim=-1) - group.amin(dim=-1)).repeat_interleave(GROUP, dim=-1)
    # Half a step of 16 levels, and what bfloat16 rounds off the least value and 15 scales.
    bound = span / 30 + (group.abs().amax(dim=-1) * 2**-7).repeat_interleave(GROUP, dim=-1)
    assert ((read - weight).abs() <= bound).all()
    torch.testing.assert_close(unpack(packed, torch.bfloat16), read.bfloat16())


def test_equal_numbers_zeros_and_odd_widths():
    even = torch.tensor([0.0, 0.5, -2.0])[:, None].expand(3, GROUP)
    assert torch.equal(unpack(pack(even), torch.float32), even)
    with pytest.raises(ConfigError, match="multiple of 32 numbers, but they have 48"):
        pack(torch.zeros(2, 48))


@pytest.mark.parametrize("T", [1, 7, 40])
@torch.no_grad()
def test_packed_experts_equal_experts_of_the_rounded_weights(T):
    torch.manual_seed(0)
    E, D, F = 5, 64, 96
    experts, expected = Experts(E, D, F), Experts(E, D, F)
    experts.reset_parameters(0.1)
    experts.pack()
    for name, packed in experts.named_parameters():
        assert is_quantised(packed)
        expected.get_parameter(name).copy_(unpack(packed, torch.float32))
    gate_TE = torch.relu(torch.randn(T, E))
    gate_TE[:, 3] = 0  # an expert without tokens
    pairs, x_TD = Assignment.from_gates(gate_TE, gate_TE > 0), torch.randn(T, D)
    torch.testing.assert_close(experts(x_TD, pairs), expected(x_TD, pairs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(experts(x_TD), expected(x_TD), rtol=1e-5, atol=1e-5)
    assert f"num_experts={E}, d_model={D}, d_ffn={F}" in repr(experts)
    experts.reset_parameters(1.0)  # packed weights are not drawn
    torch.testing.assert_close(experts(x_TD, pairs), expected(x_TD, pairs), rtol=1e-5, atol=1e-5)
