"""Records of finished runs: options by today's names, and folders in which they are packed."""

import json
import lzma
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
from finished_run import DATA, record, routing

from remoe.errors import ConfigError
from remoe.lab.compare.experiment import experiment_from_dict
from remoe.lab.compare.record import DataDescription, RecordFolder, RunRecord, options_of, todays_names


def run_record(loss=4.0, **summary):
    return record({"validation_loss": loss, **summary}, routing())


@pytest.fixture
def folder(tmp_path):
    return RecordFolder(tmp_path / "records")


def files(folder):
    return sorted(path.name for path in folder.path.iterdir())


def test_options_of_a_run_say_what_its_router_was_built_with():
    asked = {"base": {"model": {"load_balance": False}}, "variants": {"relu": {}, "norm": {"router": "relu_norm"}}}
    options = {run.variant: options_of(run.config) for run in experiment_from_dict(asked, "x", "x").runs}
    assert options["relu"]["router_options.load_balance"] is False
    assert options["relu"]["router_options.load_balance_power"] == 1.0
    assert "router_options.locality" in options["norm"]
    assert "router_options.load_balance" not in options["norm"]


def test_options_have_todays_names():
    old = {"router": "relu", "model.experts_backend": "loop", "model.load_balance": False, "k": 1}
    found = todays_names(old | {"router_options.load_balance": True, "model.max_experts_per_token": 3})
    assert found == {
        "router": "relu", "k": 1, "model.backend": "cpu", "router_options.load_balance": False,
        "router_options.max_experts_per_token": 3,
    }  # fmt: skip
    assert todays_names(found) == found
    assert todays_names(old | {"router": "topk"}) == {"router": "topk", "k": 1, "model.backend": "cpu"}


def test_a_record_is_found_in_its_own_file_and_packed_and_the_newer_one_counts(folder):
    first, second = run_record(4.0), run_record(3.0, seed=1)
    folder.save("a-00000001", first)
    folder.save("b-00000002", second)
    assert (folder.load("a-00000001"), folder.load("c-00000003")) == (first, None)
    folder.pack("trial", ["b-00000002", "a-00000001"], DATA)
    assert files(folder) == ["trial.jsonl.xz"]
    assert folder.names() == ["a-00000001", "b-00000002"]
    for anywhere in (folder, RecordFolder(folder.path)):
        assert [anywhere.load(name) for name in folder.names()] == [first, second]
        assert anywhere.data() == [DATA]
    newer = replace(first, summary=first.summary | {"validation_loss": 2.0})
    folder.save("a-00000001", newer)
    assert folder.load("a-00000001") == newer
    folder.pack("other", ["a-00000001"], DATA)  # stays where it was
    assert files(folder) == ["trial.jsonl.xz"]
    assert [folder.load(name) for name in folder.names()] == [newer, second]


def test_packed_files_are_the_same_bytes_in_any_order_and_a_shared_run_stands_once(tmp_path):
    contents, other = [], DataDescription("another", ["b"], 1, 1)
    for names in (["a-00000001", "b-00000002"], ["b-00000002", "a-00000001"]):
        folder = RecordFolder(tmp_path / names[0])
        for name in names:
            folder.save(name, run_record(seed=int(name[-1])))
            folder.pack("one", [name], DATA if name.startswith("a") else other)
        folder.save("c-00000003", run_record())
        folder.pack("two", ["a-00000001", "c-00000003"], DATA)
        contents.append([(folder.path / file).read_bytes() for file in ("one.jsonl.xz", "two.jsonl.xz")])
        header, *lines = lzma.decompress(contents[-1][1]).splitlines()
        assert json.loads(header)["runs"] == ["c-00000003"]
        assert len(lines) == 1
        assert {one.fingerprint for one in folder.data()} == {"another", "fingerprint"}
    assert contents[0] == contents[1]


def test_a_kill_between_packing_and_deleting_loses_nothing(folder, monkeypatch):
    folder.save("a-00000001", run_record())
    unlink = Path.unlink

    def killed(path, **options):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as context:
        context.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.pack("trial", ["a-00000001"], DATA)
    assert files(folder) == ["a-00000001.json", "trial.jsonl.xz"]
    assert RecordFolder(folder.path).names() == ["a-00000001"]
    folder.pack("trial", ["a-00000001"], DATA)
    assert files(folder) == ["trial.jsonl.xz"]
    assert folder.load("a-00000001") == run_record()


def test_a_reader_sees_what_another_process_packs(folder):
    reader = RecordFolder(folder.path)
    assert reader.names() == []
    for number in range(3):
        name = f"a-0000000{number}"
        folder.save(name, run_record(seed=number))
        folder.pack("trial", [name], DATA)
        assert reader.load(name) == run_record(seed=number)


def save_and_pack(path, start):
    folder = RecordFolder(path)
    for number in range(start, start + 5):
        folder.save(f"run-{number:08d}", run_record(seed=number))
        folder.pack(f"experiment{start}", [f"run-{one:08d}" for one in range(10)], DATA)


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_processes_that_save_and_pack_at_the_same_time_lose_nothing(folder):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=save_and_pack, args=(folder.path, start)) for start in (0, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert folder.names() == [f"run-{number:08d}" for number in range(10)]
    assert all(file.endswith(".jsonl.xz") for file in files(folder))
    packed = [json.loads(lzma.decompress(path.read_bytes()).splitlines()[0])["runs"] for path in folder.path.iterdir()]
    assert sum(map(len, packed)) == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-9], "is not a complete file of records"),
        (lambda content: lzma.compress(lzma.decompress(content).split(b"\n")[0]), "is not a complete file of records"),
        (lambda content: lzma.compress(b"{}"), "is not a complete file of records"),
        (
            lambda content: lzma.compress(lzma.decompress(content).replace(b'"version":1', b'"version":2')),
            "was written by a newer version",
        ),
    ],
)
def test_a_damaged_or_newer_file_is_named(damage, message, folder):
    folder.save("a-00000001", run_record())
    folder.pack("trial", ["a-00000001"], DATA)
    path = folder.path / "trial.jsonl.xz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=message):
        RecordFolder(folder.path).load("a-00000001")


def test_a_damaged_packed_record_is_named_with_its_run(folder):
    folder.save("a-00000001", run_record())
    folder.pack("trial", ["a-00000001"], DATA)
    path = folder.path / "trial.jsonl.xz"
    header = lzma.decompress(path.read_bytes()).split(b"\n")[0]
    path.write_bytes(lzma.compress(header + b"\n[]\n"))
    with pytest.raises(ConfigError, match="a-00000001, is not a complete record"):
        RecordFolder(folder.path).load("a-00000001")


def test_a_record_keeps_everything(tmp_path):
    made = run_record()
    made.save(tmp_path / "x.json")
    assert RunRecord.load(tmp_path / "x.json") == made
