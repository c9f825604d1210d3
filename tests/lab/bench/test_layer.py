"""The benchmarks of layers run, and their figures fit together."""

import json

import pytest
import torch

from remoe.lab.bench import decode, layer, roofline
from remoe.lab.bench.decode import bench_decode
from remoe.lab.bench.layer import Case, bench_layer, ratio_beyond_weights, relu_layer, tokens
from remoe.lab.bench.peers import peer_layers
from remoe.lab.bench.roofline import Roofline
from remoe.lab.bench.timing import peak_bytes
from remoe.lab.cli.main import main

CPU, FLOAT32 = torch.device("cpu"), torch.float32
OURS = {"dense", "dense oneDNN", "remoe relu", "remoe topk"}
PEERS = {"transformers eager", "transformers grouped_mm", "grouped_mm, relu load"}


@pytest.mark.parametrize("peers", [True, False])
def test_layer(peers):
    case = Case(64, 16, 32, 4, 2)
    row = bench_layer(case, CPU, FLOAT32, ("auto",), peers, 2, Roofline(1e9, 1e9, 1e9))
    names = OURS | {"remoe dense"} | (PEERS if peers else set())
    assert set(row["milliseconds"]) == set(row["peak_megabytes"]) == names
    assert row["ratio_to_dense"]["dense"] == 1
    dense = {name: row["milliseconds"][name] for name in ("dense", "dense oneDNN")}
    assert row["milliseconds"][row["fastest_dense"]] == min(dense.values())
    assert row["ratio_to_fastest_dense"][row["fastest_dense"]] == 1
    dense_weights = 4 * 3 * case.D * case.k * case.F
    for name in names:
        assert 0 < row["activation_megabytes"][name] < row["peak_megabytes"][name]
    assert row["peak_megabytes"]["dense"] - row["activation_megabytes"]["dense"] == pytest.approx(dense_weights / 1e6)
    for name in names:
        assert row["milliseconds"][name] == pytest.approx(row["ratio_to_dense"][name] * row["milliseconds"]["dense"])
    assert set(row["dense_stage_peak_megabytes"]) == {"remoe relu"}
    traffic = 3 * 4 * (3 * 4 * 16 * 32)  # bytes: weights read twice, gradients written; 4 experts, float32
    beyond = {name: row["milliseconds"][name] - 1e3 * traffic / 1e9 for name in names if "dense" not in name}
    assert row["milliseconds_beyond_weights"] == pytest.approx(beyond)
    twice = {"milliseconds_beyond_weights": {name: 2 * ms for name, ms in beyond.items()}}
    assert ratio_beyond_weights(twice, row) == pytest.approx(dict.fromkeys(beyond, 2))
    json.dumps(row)


def test_a_peer_computes_the_ragged_load_that_it_is_given():
    case = Case(48, 16, 32, 6, 2)
    ours, x = relu_layer(case, "cpu", 0.4), tokens(48, 16, CPU, FLOAT32)
    y, routing = ours(x)
    active_T = (routing.gate_TE > 0).sum(dim=1)
    assert active_T.min() < active_T.max()
    peer = peer_layers(case, CPU, ours.router, int(active_T.max()))["grouped_mm, relu load"]
    peer.experts.load_state_dict(ours.experts.state_dict())
    x.requires_grad_()
    poison = [torch.full((n,), torch.nan) for n in [250_000] * 16 + [2_000] * 200]  # freed, handed out as "empty"
    del poison
    torch.testing.assert_close(peer(x), y)
    peer(x).sum().backward()
    assert x.grad.isfinite().all()
    y.sum().backward()
    torch.testing.assert_close(peer.router.weight.grad, ours.router.weight.grad)


def test_decode(monkeypatch):
    monkeypatch.setattr(decode, "RESIDENT_BYTES", 2**18)  # of layers so small that would be fourteen thousand
    row = bench_decode(Case(3, 16, 32, 4, 1), CPU, FLOAT32, ("auto", "naive"), False, 2, Roofline(1, 1, 1))
    assert set(row["milliseconds"]) == OURS | {"remoe naive relu", "remoe naive topk"}
    assert all(1 <= active <= 3 for active in row["active_experts"].values())
    json.dumps(row)


@pytest.mark.parametrize("kind", ["layer", "decode"])
def test_the_quick_command_says_what_it_leaves_out_and_writes_a_file_that_diff_reads(
    kind, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(roofline, "measure_roofline", lambda device, dtype: Roofline(1, 1, 1))
    monkeypatch.setattr(layer, "CASES", {"cpu": (Case(20, 16, 8, 4, 1),)})
    monkeypatch.setattr(decode, "CASES", (Case(3, 16, 8, 4, 1),))
    monkeypatch.setattr(decode, "RESIDENT_BYTES", 2**14)
    file = tmp_path / "a.json"
    assert main(["bench", kind, "--quick", "--device", "cpu", "--out", str(file)]) == 0
    assert "Left out by --quick: other implementations" in " ".join(capsys.readouterr().out.split())
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row["milliseconds"]) == OURS | ({"remoe dense"} if kind == "layer" else set())
    assert not row.get("peak_megabytes")
    assert main(["bench", "diff", str(file), str(file)]) == 0


@pytest.mark.parametrize("density", [0.125, 0.5, 1])
def test_the_relu_layer_has_the_wanted_density(density):
    layer = relu_layer(Case(4096, 32, 8, 16, 1), "auto", density)
    _, routing = layer(tokens(4096, 32, CPU, FLOAT32))
    assert 1 - routing.sparsity == pytest.approx(density, abs=0.02)


def test_peak_memory_is_that_of_the_largest_moment():
    def function():
        a = torch.empty(1_000_000)
        b = torch.empty(500_000)
        del a
        torch.empty(100_000)
        del b

    assert peak_bytes(function, CPU) == pytest.approx(6e6, rel=0.01)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["layer", "--backends", "fast"], "unknown experts backend 'fast'"),
        (["layer", "--backends", "triton", "--cases", "experts"], "experts backend 'triton' cannot run here: "),
        (["decode", "--dtype", "int8"], "dtype"),
        (["decode", "--out", "."], "--out . is a folder"),
        (["speed"], "unknown command 'bench speed'"),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    if torch.cuda.is_available() and "triton" in argv:
        pytest.skip("it can run here")
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
