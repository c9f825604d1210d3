"""What `remoe plan --mesh` says of many processes, against figures by hand."""

import re
from dataclasses import replace

import pytest
import torch

from remoe.costs import STORED_RATIO
from remoe.errors import ConfigError
from remoe.experts.exchange import RECEIVE_ROWS, ExchangePlan
from remoe.lab.cli.main import main
from remoe.lab.scaling import memory, traffic
from remoe.lab.scaling.estimate import step_time, transfer_time
from remoe.lab.scaling.gpus import GPU, GPUS, parse_gpu, peak_flops
from remoe.lab.scaling.memory import rank_memory
from remoe.lab.scaling.shards import Job, groups
from remoe.lab.scaling.traffic import Collective
from remoe.lab.training.mesh import Mesh
from remoe.lab.training.presets import PRESETS
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.plan import sizes_of


def job(mesh, *, preset="tiny", batch_size=64, micro=1, **options):
    sizes = sizes_of(RemoeConfig(**PRESETS[preset]["model"], vocab_size=4096, **options))
    return Job(sizes, Mesh.parse(mesh), 256, batch_size, micro)


@pytest.mark.parametrize("mesh", ["fsdp=2", "fsdp=4,ep=2", "replicate=2,fsdp=2", "tp=2", "fsdp=2,tp=2"])
@pytest.mark.parametrize("router", ["relu", "dense", "lory"])
def test_every_weight_is_in_one_group(mesh, router):
    options = {"router": router, "num_experts": 8, "shared_expert_size": 64}
    if "ep" in mesh and router != "relu":
        return
    planned = job(mesh, **options)
    model = RemoeForCausalLM(RemoeConfig(**PRESETS["tiny"]["model"], vocab_size=4096, **options))
    whole = sum(parameter.numel() for parameter in model.parameters())
    one = sum(group.count * group.numbers for group in groups(planned.sizes, Mesh()))
    assert one == whole
    shards = sum(group.count * group.shard for group in groups(planned.sizes, planned.mesh))
    assert shards >= whole / planned.mesh.processes * planned.mesh.replicate


def test_fsdp_shards_no_more_ways_than_there_are_experts():
    planned = [job(f"fsdp={n}", num_experts=8) for n in (8, 64)]
    layers = [groups(p.sizes, p.mesh)[1] for p in planned]
    experts = 3 * 128 * 512  # of one expert
    assert layers[0].shard - layers[1].shard < experts  # a rank keeps a whole expert either way
    assert layers[1].gathered > 7 * layers[0].gathered  # and the padding travels


@pytest.mark.parametrize("pairs", [1000, 40_000])
def test_the_exchange_sends_what_its_own_plan_counts(pairs):
    P, D, E = 4, 128, 8
    planned = replace(job("fsdp=4,ep=4", num_experts=E), seq_len=pairs * P // 4, micro_batch_size=1)
    plan = ExchangePlan(torch.full((P, E), pairs * P // E), rank=1)
    forward, backward = plan.bytes_sent(D, 4)
    exchanged = [c for c in traffic.traffic(planned, 0.5) if c.purpose in ("routed pairs", "counts of pairs")]
    assert sum(c.sent for c in exchanged) == planned.passes * 4 * (forward + backward)
    assert traffic.RECEIVE_ROWS == RECEIVE_ROWS


def test_memory_is_divided_as_the_mesh_says():
    one, sharded, experts = (rank_memory(job(mesh, num_experts=8), 0.125) for mesh in ("tp=1", "fsdp=8", "fsdp=8,ep=8"))
    assert one.weights > 7.9 * sharded.weights
    assert one.gathered == 0
    assert sharded.gathered > experts.gathered > 0
    assert sharded.activations == one.activations < experts.activations
    one = rank_memory(job("tp=1", num_experts=8, batch_size=1), 0.125)  # gradients come as activations go
    assert one.peak < one.weights * 4 + one.activations + one.whole_gradients + one.scratch
    again = rank_memory(replace(job("fsdp=8", num_experts=8), recompute=True), 0.125)
    assert again.activations < 0.5 * sharded.activations
    assert memory.STORED_RATIO == STORED_RATIO


GROUP_OF_8 = GPU(100, 80, 1000, within=100, between=10, per_node=8)


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "seconds"),
    [
        ("all-gather", 8, 1, 0.01),  # 1 GB within a node
        ("all-gather", 16, 1, 0.0125),  # an eighth of it over each of eight links between nodes
        ("all-gather", 4, 8, 0.1),  # each rank in a node of its own
        ("all-gather", 8, 4, 0.05),  # two in each node
        ("all-to-all", 8, 1, 0.01),
        ("all-to-all", 16, 1, 8 / 15 / 10),  # eight of the fifteen others are in the other node
    ],
)
def test_the_slowest_link_counts(kind, ranks, stride, seconds):
    assert transfer_time(Collective(kind, "", ranks, stride, 1e9), GROUP_OF_8) == pytest.approx(seconds)


def test_time_of_a_step_by_hand():
    planned = job("fsdp=8", num_experts=8)
    time = step_time(planned, 0.125, GROUP_OF_8, efficiency=0.5)
    flops = 64 / 8 * 6 * 256 * (4 * (2 * 128 * 128 * 1.5 + 2 * 256 * 128 + 3 * 128 * 512) + 128 * 4096)
    assert time.products == pytest.approx(flops / 50e12)
    shard = sum(g.count * g.shard for g in groups(planned.sizes, planned.mesh))
    assert time.optimizer == pytest.approx(28 * shard / 1e12)
    assert time.least < time.most == pytest.approx(time.products + time.beside + time.waiting + time.optimizer)
    assert step_time(replace(planned, recompute=True), 0.125, GROUP_OF_8).products == pytest.approx(
        time.products * 4 / 3
    )


def test_gpus_by_name_and_by_figures():
    assert parse_gpu("H200") is GPUS["h200"]
    assert parse_gpu("h200,between=25").between == 25
    assert parse_gpu("h200,between=25").source.endswith("given by the user: between=25")
    own = parse_gpu("tflops=100, memory=64,bandwidth=1000,within=50,between=5,per_node=4")
    assert (own.tflops, own.memory, own.per_node) == (100, 64, 4)
    for text, words in {
        "h300": "unknown GPU 'h300'; choose of: a100",
        "h200,speed=1": "unknown figure 'speed'",
        "h200,memory=0": "memory must be a number above 0",
        "h200,memory=nan": "memory must be a number above 0",
        "h200,per_node=2.5": "per_node must be a whole number",
        "h200,memory=1,memory=2": "memory is given twice",
        "tflops=100": "give memory, bandwidth, within, between too",
    }.items():
        with pytest.raises(ConfigError, match=words):
            parse_gpu(text)


def test_gpus_by_the_names_of_their_driver():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    for other in (
        "NVIDIA H100 PCIe",
        "NVIDIA H200 NVL",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    ):
        assert peak_flops(other) is None


def test_a_plan_for_ten_thousand_gpus(capsys):
    assert main(["plan", "978m", "--mesh", "fsdp=8,ep=8", "--gpus", "10000", "--gpu", "h200"]) == 0
    output = capsys.readouterr().out
    assert "10,000 processes: replicate 1250, fsdp 8, ep 8, tp 1; 160,000 sequences per step" in output
    for words in ("peak memory", "all-to-all of routed pairs", "all-reduce of gradients", "tokens per second", "MFU"):
        assert words in output
    assert main(["plan", "978m", "--mesh", "fsdp=64", "--batch-size", "128"]) == 0
    output = capsys.readouterr().out
    assert "for each part 1 x 2; float32" in output
    assert "MFU" not in output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "8"], "--gpus needs --mesh"),
        (["--batch-size", "8"], "--batch-size needs --mesh"),
        (["--mesh", "fsdp=8", "--gpus", "12"], "does not fit --gpus 12: it needs 8"),
        (["--mesh", "fsdp=8,replicate=2", "--gpus", "32"], "does not fit --gpus 32: it needs 16"),
        (["--mesh", "fsdp=3,ep=3"], "ep=3 does not divide the 8 experts"),
        (["--mesh", "tp=8"], "tp=8 does not divide the number of attention heads, 4"),
        (["--mesh", "fsdp=8", "--batch-size", "12"], "8 parts .* do not divide --batch-size 12"),
        (["--mesh", "fsdp=8", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--mesh", "fsdp=8", "--gpus", "0"], "does not fit --gpus 0"),
        (["--mesh", "fsdp=8", "--dtype", "fp8"], "fp8"),
        (["--mesh", "fsdp=8", "--gpu", "h200", "--efficiency", "0"], "--efficiency must be above 0"),
    ],
)
def test_plans_that_are_not_possible(flags, words, capsys):
    assert main(["plan", "tiny", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.search(words, line)
