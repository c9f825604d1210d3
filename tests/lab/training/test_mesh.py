"""`--mesh`: what is understood, what is refused before anything is allocated, and what it does not change."""

import shutil

import pytest
from tiny_run import FLAGS

from remoe.errors import ConfigError
from remoe.lab.cli.main import main
from remoe.lab.compare.keys import key_of
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import Mesh, mesh_of
from remoe.lab.training.ranks import Ranks

SIZES = {"batch_size": 8, "micro_batch_size": 2, "num_experts": 4}


def config(**options):
    return config_from_dict({**SIZES, **options}, "test")


def test_sizes_are_read_in_any_order():
    mesh = Mesh.parse("ep=2, fsdp=4,replicate=2")
    assert mesh == Mesh(replicate=2, fsdp=4, ep=2)
    assert mesh.processes == mesh.parts == 8
    mesh = Mesh.parse("tp=2,fsdp=4")
    assert (mesh.processes, mesh.parts) == (8, 4)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("fspd=2", {}, "unknown size 'fspd'"),
        ("fsdp", {}, "fsdp must be a whole number"),
        ("fsdp=0", {}, "fsdp must be a whole number"),
        ("fsdp=2,fsdp=2", {}, "fsdp is given twice"),
        ("tp=2", {"model": {"num_attention_heads": 3, "hidden_size": 48}}, "tp=2 does not divide .* heads, 3"),
        ("tp=2", {"model": {"num_key_value_heads": 1}}, "tp=2 does not divide .* key-value heads, 1"),
        ("tp=2", {"model": {"intermediate_size": 33}}, "tp=2 does not divide the width of an expert, 33"),
        ("fsdp=2,ep=2,tp=2", {}, "needs 4 processes"),
        ("fsdp=4", {}, "needs 4 processes, but 2 were started"),
        ("fsdp=2,ep=3", {}, "ep=3 does not divide fsdp=2"),
        ("replicate=2,ep=2", {}, "ep=2 does not divide fsdp=1"),
        ("tp=2,ep=4", {}, "ep=4 does not divide fsdp x tp = 2"),
        ("tp=2,ep=3", {}, "ep=3 is not a multiple of tp=2"),
        ("fsdp=2,ep=2", {"num_experts": 3}, "ep=2 does not divide the 3 experts"),
        ("fsdp=2,ep=2", {"router": "dense"}, "router 'dense' does not send tokens to experts"),
        ("fsdp=2,ep=2", {"router": "lory"}, "router 'lory' does not send tokens to experts"),
        ("fsdp=2", {"batch_size": 9, "micro_batch_size": 1}, "2 parts .* do not divide --batch-size 9"),
        ("fsdp=2", {"batch_size": 12, "micro_batch_size": 4}, "--micro-batch-size 4 does not divide the 6 sequences"),
        ("fsdp=2", {"router": "reluu"}, "reluu"),
        (None, {}, "2 processes were started: say with --mesh how"),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch, text, options, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=words):
        mesh_of(config(mesh=text, **options))


@pytest.mark.parametrize("text", [None, "fsdp=1", "tp=1"])
def test_one_process_may_do_everything(text):
    assert mesh_of(config(mesh=text, compile=True, router="dense", batch_size=9, micro_batch_size=9)) == Mesh()


def test_experts_that_are_divided_whole_may_have_any_width(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = {"model": {"num_attention_heads": 2, "intermediate_size": 33}}
    assert mesh_of(config(mesh="tp=2,ep=2", **options)) == Mesh(tp=2, ep=2)


def test_an_older_transformers_is_refused(monkeypatch):
    monkeypatch.setattr("remoe.models.sharding.version", lambda name: "5.17.0")
    with pytest.raises(ConfigError, match=r"needs transformers 5.24 or newer, but 5.17.0 is installed"):
        Ranks(Mesh(fsdp=2), "cpu")


def test_without_torchrun_it_says_how_to_start(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run"), *FLAGS, "--mesh", "fsdp=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "torchrun --nproc-per-node 2 -m remoe train" in line
    assert not (tmp_path / "run").exists()


def test_a_mesh_has_no_influence_on_a_runs_key():
    assert key_of(config(mesh="fsdp=2,ep=2")) == key_of(config())
    assert key_of(config(mesh="fsdp=2,ep=2", mesh_load="official")) != key_of(config())


def test_a_run_goes_on_without_the_mesh_that_it_began_on(uninterrupted, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(uninterrupted, run.path)
    options = run.load_config()
    options.mesh = "fsdp=2"
    run.write_config(options)
    assert main(["train", "--out", str(run.path), "--resume"]) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("batches", [0, 1, 4, 5])
def test_batches_are_dealt_once_and_evenly(batches):
    dealt = []
    for rank in range(3):
        ranks = Ranks(Mesh(), "cpu")
        ranks.mesh, ranks.part = Mesh(fsdp=3), rank
        dealt.append(list(ranks.deal(range(batches))))
    assert len({len(share) for share in dealt}) == 1
    assert sorted(batch for share in dealt for batch, counts in share if counts) == list(range(batches))


def test_each_part_has_rows_of_its_own():
    parts = []
    for rank in range(6):
        ranks = Ranks(Mesh(), "cpu")
        ranks.mesh, ranks.part = Mesh(fsdp=3, tp=2), rank // 2
        parts.append(ranks.rows(12, 2))
    assert parts == [[0, 1, 6, 7]] * 2 + [[2, 3, 8, 9]] * 2 + [[4, 5, 10, 11]] * 2
