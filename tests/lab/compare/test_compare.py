"""`remoe compare` from end to end: interruption, resuming, sharing, failing, reporting."""

import json
import os
import re
import shutil
import signal
import time

import forked
import pytest
import torch
import yaml

from remoe.lab.cli.main import main
from remoe.lab.compare.experiment import load_experiment
from remoe.lab.compare.live import Live
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.record import RecordFolder
from remoe.lab.compare.runner import Worker, workers_on
from remoe.lab.data import open_dataset
from remoe.lab.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_runs")]

BASE = {
    "steps": 40, "seq_len": 32, "batch_size": 4, "micro_batch_size": 2, "num_experts": 4,
    "model": {"hidden_size": 32, "num_hidden_layers": 2}, "validate": {"every": 20, "flips_every": 10},
    "checkpoint": {"every": 10},
}  # fmt: skip
SHORT = {**BASE, "steps": 10}


def write_experiment(folder, **given):
    path = folder / "trial.yaml"
    content = {"title": "Trial", "base": BASE, "variants": {"relu": {}, "topk": {"router": "topk"}}, **given}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def arguments(path, corpus, folder):
    places = ["--data", str(corpus), "--pool", str(folder / "pool"), "--out", str(folder / "out")]
    return ["compare", str(path), *places, "--device", "cpu"]


def test_the_matrix_ends_in_tables_and_figures_and_repeats_nothing(corpus, tmp_path, capfd, monkeypatch, request):
    monkeypatch.setattr("remoe.lab.compare.live.LINE_SECONDS", 0.0)
    monkeypatch.setattr("remoe.lab.compare.runner.POLL_SECONDS", 0.05)  # a run may last less than the default second
    path = write_experiment(tmp_path, variants={"relu": {}, "topk": {"router": "topk"}, "dense": {"router": "dense"}})
    command = arguments(path, corpus, tmp_path)
    assert main([*command, "--list"]) == 0
    out = capfd.readouterr().out
    assert "·" in out
    assert out.endswith("0 of 3 runs finished; equal FLOPs needs up to 2 more\n")
    figures = tmp_path / "out" / "figures"
    figures.mkdir(parents=True)
    for name in ("routed-share-by-domain-gone.png", "routed-share-by-domain-gone.svg", "mine.png"):
        (figures / name).touch()
    assert main(command) == 0
    out = capfd.readouterr().out
    assert "3 of" in out
    assert "and equal FLOPs" in out
    assert re.search(r"relu-.*: step \d+/\d+  loss \d", out)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["variant"] for row in found["equal_tokens"]] == ["relu", "topk", "dense"]
    reference, *others = found["equal_flops"]
    for row in others:
        assert row["flops"] == pytest.approx(reference["flops"], rel=0.03)  # 40 steps cannot be cut finer
    assert set(found["routing"]) == {"relu", "topk"}
    (topk,) = found["routing"]["topk"]
    assert topk["sparsity_per_layer"] == [0.75, 0.75]
    assert topk["flip_rate"] > 0
    assert found["missing"] == []
    report = (tmp_path / "out" / "results.md").read_text()
    page = (tmp_path / "out" / "figures.md").read_text()
    for name in ("loss-equal-tokens", "flips", "routed-share", "active-against-frequency", "training-course"):
        assert f"figures/{name}.png" in page
        assert (tmp_path / "out" / "figures" / f"{name}.svg").stat().st_size > 0
    assert "topk, seed 0: tokens with the highest share in each expert" in report
    assert [path.name for path in figures.iterdir() if path.stem not in page] == ["mine.png"]
    assert len(list(figures.glob("*.png"))) - 1 == len(list(figures.glob("*.svg"))) > 5
    finished = list((tmp_path / "pool").glob("*/summary.json"))
    assert len(list((tmp_path / "pool").glob("*.json"))) == len(finished) > 3  # also of the runs at equal FLOPs

    request.getfixturevalue("no_figures")  # it draws the same again
    logs = {log: log.stat().st_mtime_ns for log in (tmp_path / "pool").glob("*.log")}
    assert main(command) == 0  # nothing is left to run
    assert not re.search("started|resumed", capfd.readouterr().out)
    assert logs == {log: log.stat().st_mtime_ns for log in (tmp_path / "pool").glob("*.log")}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found

    records = tmp_path / "records"  # all that is left of the runs, on another machine
    records.mkdir()
    for record in (tmp_path / "pool").glob("*.json"):
        shutil.move(record, records)
    shutil.rmtree(tmp_path / "pool")
    assert main([*command, "--records", str(records)]) == 0
    assert not re.search("started|resumed", capfd.readouterr().out)
    assert not list((tmp_path / "pool").glob("*.log"))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert (tmp_path / "out" / "results.md").read_text() == report
    assert [path.name for path in records.iterdir()] == ["trial.jsonl.xz"]

    content = (records / "trial.jsonl.xz").read_bytes()  # enough without the data
    shutil.rmtree(tmp_path / "out")
    without = [
        "compare",
        str(path),
        "--pool",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    assert main([*without, "--records", str(records), "--report-only"]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert (tmp_path / "out" / "results.md").read_text() == report
    assert (records / "trial.jsonl.xz").read_bytes() == content
    assert not (tmp_path / "none").exists()
    capfd.readouterr()
    assert main([*without, "--records", str(records), "--list"]) == 0
    assert re.search(r"(\d+) of \1 runs finished", capfd.readouterr().out)


@pytest.mark.usefixtures("no_figures")
def test_a_failed_run_is_named_and_the_others_go_on(corpus, tmp_path, capfd):
    variants = {"bad": {"optim": {"lr": 1e30}}, "topk": {"router": "topk"}}
    path = write_experiment(tmp_path, base=SHORT, variants=variants, reference="topk")
    assert main(arguments(path, corpus, tmp_path)) == 1
    out = capfd.readouterr().out
    assert "failed: remoe: error: step 2: not finite" in out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["variant"] for row in found["equal_tokens"]] == ["topk"]
    assert len(found["missing"]) == 2


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_without_a_record_gets_one(corpus, tmp_path, capfd):
    path = write_experiment(tmp_path, base=SHORT, seeds=[0, 1], variants={"topk": {"router": "topk"}})
    command = arguments(path, corpus, tmp_path)
    assert main(command) == 0
    files = list((tmp_path / "pool").glob("*.json"))
    assert len(files) == 2
    for file in files:
        file.unlink()
    capfd.readouterr()
    records = tmp_path / "records"
    assert main([*command, "--records", str(records)]) == 0
    assert f"records: {records} is new; it has no finished runs\n" in capfd.readouterr().out
    assert sorted(RecordFolder(records).names()) == sorted(file.stem for file in files)
    shutil.rmtree(tmp_path / "pool" / files[0].stem / "checkpoints")
    shutil.rmtree(records)
    records.mkdir()
    capfd.readouterr()
    assert main([*command, "--records", str(records)]) == 1
    out = capfd.readouterr().out
    assert "no record: " in out
    assert "is new" not in out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["routing"]["topk"]  # of the other seed


def test_a_model_that_cannot_be_built_is_named_before_any_training(corpus, tmp_path, capsys):
    for options, message in (
        ({"router": "bogus"}, "unknown router 'bogus'"),
        ({"k": 9}, "k = 9"),
        ({"router": "topk", "router_options": {"bogus": 1}}, "bogus"),
        ({"model": {"hidden_size": 30}}, "hidden_size"),
    ):
        path = write_experiment(tmp_path, variants={"relu": {}, "bad": options})
        assert main(arguments(path, corpus, tmp_path)) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "seed0: " in error
        assert error.count("\n") == 0
    assert not list((tmp_path / "pool").glob("tiny*"))


def start(path, corpus, folder, *flags):
    """The process, and the file with its output."""
    output = folder / f"output-{time.monotonic_ns()}"
    return forked.Compare([*arguments(path, corpus, folder), *flags], output), output


def wait_for(condition, process=None):
    for _ in range(1200):
        if condition():
            return
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.1)
    pytest.fail("waited two minutes")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_cut_off_goes_on_where_it_was(corpus, tmp_path, number):
    base = {**BASE, "steps": 80}
    path = write_experiment(tmp_path, base=base, variants={"relu": {}})
    run = load_experiment(path).runs[0]
    pool = Pool(tmp_path / "pool", open_dataset(corpus).fingerprint)
    first, output = start(path, corpus, tmp_path)
    wait_for(lambda: pool.folder(run).last_checkpoint() is not None, first)
    first.send_signal(number)
    first.wait(60)
    if number == signal.SIGINT:
        assert first.returncode == 130
        said = output.read_text()
        assert said.index("stopping: saving checkpoints\n") < said.index("stopped; the same command continues")
    with pool.claimed(run) as log:  # the child of a killed parent trains on, and keeps others away
        assert (log is None) == (number == signal.SIGKILL)
    if number == signal.SIGKILL:
        second, output = start(path, corpus, tmp_path)
        assert second.wait(120) == 0  # it waits for the child, and makes the record that is missing
        assert not re.search("started|resumed", output.read_text())
        assert pool.recorded(run)
    assert main(arguments(path, corpus, tmp_path)) == 0
    assert pool.summary(run)["steps"] == 80
    assert [record["step"] for record in read_metrics(pool.folder(run).metrics)] == list(range(1, 81))


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_two_processes_share_the_work_and_the_preparation(tmp_path):
    """Each run is trained once, those at equal FLOPs that follow from the other's runs too, and both end well."""
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(f"word{i * j % 11} and" for j in range(300)))
    path = write_experiment(tmp_path, base={**BASE, "steps": 20, "vocab_size": 300})
    command = ["compare", str(path), "--corpus", str(tmp_path / "text"), "--pool", str(tmp_path / "pool")]
    command += ["--device", "cpu", "--out"]
    names = ("one", "other")
    files = [tmp_path / f"{name}.log" for name in names]
    both = [forked.Compare([*command, str(tmp_path / name)], file) for name, file in zip(names, files, strict=True)]
    codes, outputs = [process.wait(300) for process in both], [file.read_text() for file in files]
    assert codes == [0, 0], outputs
    started = re.findall(r"(\S+): started at step 0", "".join(outputs))
    assert len(started) == len(set(started)) == len(list((tmp_path / "pool").glob("*/summary.json"))) == 3
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in names]
    assert found[0] == found[1]
    assert found[0]["missing"] == []


@pytest.mark.usefixtures("no_figures")
@pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
def test_workers_train_side_by_side(corpus, tmp_path, capfd):
    base = {**BASE, "steps": 80}
    path = write_experiment(tmp_path, base=base, equal_flops=False)
    pool = Pool(tmp_path / "pool", open_dataset(corpus).fingerprint)
    runs = load_experiment(path).runs
    process, output = start(path, corpus, tmp_path, "--workers", "2")
    wait_for(lambda: all(pool.folder(run).last_checkpoint() for run in runs), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert re.findall(r"(\S+): stopped; the same command", output.read_text()) != []
    steps = [read_metrics(pool.folder(run).metrics)[-1]["step"] for run in runs]
    assert all(0 < step < 80 for step in steps)  # both were on their way, and both have stopped
    assert main([*arguments(path, corpus, tmp_path), "--workers", "2"]) == 0
    assert "another process" not in capfd.readouterr().out  # a worker waits for the other in silence
    for run in runs:
        assert [record["step"] for record in read_metrics(pool.folder(run).metrics)] == list(range(1, 81))
        assert pool.summary(run)["machine"]["threads"] == max(1, torch.get_num_threads() // 2)


@pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
def test_a_workers_error_stops_the_others(corpus, tmp_path, monkeypatch, capfd):
    variants = {"short": {"steps": 2}, "long": {"steps": 100_000}}
    path = write_experiment(tmp_path, variants=variants, equal_flops=False)
    pool = Pool(tmp_path / "pool", open_dataset(corpus).fingerprint)
    long = load_experiment(path).runs[1]

    def fail(*_, **__):
        wait_for(lambda: pool.folder(long).config.exists())  # the other worker has begun
        raise OSError("no space left")

    monkeypatch.setattr(Pool, "record", fail)
    assert main([*arguments(path, corpus, tmp_path), "--workers", "2"]) != 0
    assert "no space left" in capfd.readouterr().err
    with pool.claimed(long) as lock:  # nothing trains on unseen
        assert lock is not None
    assert pool.state(long) == "unfinished"


@pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
def test_an_error_while_a_run_trains_stops_that_run(corpus, tmp_path, monkeypatch, capfd):
    path = write_experiment(tmp_path, base={**BASE, "steps": 100_000}, variants={"relu": {}})
    pool = Pool(tmp_path / "pool", open_dataset(corpus).fingerprint)
    (run,) = load_experiment(path).runs

    def fail(_):
        if pool.folder(run).last_checkpoint() is not None:
            raise OSError("the terminal is gone")

    monkeypatch.setattr(Live, "show", fail)
    assert main(arguments(path, corpus, tmp_path)) != 0
    assert "the terminal is gone" in capfd.readouterr().err
    with pool.claimed(run) as lock:
        assert lock is not None
    assert pool.state(run) == "unfinished"


def test_workers_share_threads_and_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert workers_on("auto", 1) == [Worker("auto", 7)]
    assert workers_on("cpu", 3) == [Worker("cpu", 2)] * 3
    assert workers_on("cuda", 3) == [Worker("cuda:0", 2), Worker("cuda:1", 2), Worker("cuda:0", 2)]
    assert workers_on("cuda:1", 9) == [Worker("cuda:1", 1)] * 9


@pytest.mark.usefixtures("no_figures")
def test_a_corpus_that_changes_is_refused_and_reported_as_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("texts", "other/texts"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(12):
            (tmp_path / folder / f"{i}.txt").write_text(" ".join(f"word{i * j % 11} and" for j in range(300)))
    path = write_experiment(tmp_path, base={**BASE, "steps": 2, "vocab_size": 300}, variants={"relu": {}})

    def compare(corpus, *flags):
        code = main(["compare", str(path), "--corpus", corpus, "--pool", "pool", "--out", "out", *flags])
        return code, capsys.readouterr().err.strip().rpartition("\n")[2]

    assert compare("texts")[0] == 0
    for same in ("texts/", str(tmp_path / "texts")):
        assert compare(same)[0] == 0
    advice = "delete that folder or use another --pool; runs on the old text are not comparable with new ones"
    prefix = "remoe: error: "
    error = f"{prefix}pool/data/texts-bpe300 was made from {tmp_path}/texts, not from {tmp_path}/other/texts: {advice}"
    assert compare("other/texts") == compare("other/texts", "--report-only") == (2, error)
    (tmp_path / "texts" / "new.txt").write_text("more")
    error = f"{prefix}the corpus {tmp_path}/texts has changed since pool/data/texts-bpe300 was made: {advice}"
    assert compare("texts") == (2, error)
    shutil.rmtree(tmp_path / "texts")
    (tmp_path / "out" / "results.md").unlink()
    assert compare("texts", "--report-only")[0] == compare("texts", "--list")[0] == 0
    assert (tmp_path / "out" / "results.md").exists()


def test_bad_input_is_one_line(corpus, tmp_path, capsys):
    (tmp_path / "bad").mkdir()
    bad = write_experiment(tmp_path / "bad", base={**BASE, "k": 99}, variants={"relu": {}})
    path = write_experiment(tmp_path)
    for flags, message in (
        (["compare", str(tmp_path / "none.yaml")], "cannot read experiment"),
        (["compare", str(path), "--data", "x", "--corpus", "y"], "cannot be combined"),
        (["compare", str(path), "--data", str(tmp_path / "none")], "none"),
        ([*arguments(path, corpus, tmp_path)[:-4], "--out", str(path)], "is not a folder"),
        (
            [*arguments(path, corpus, tmp_path), "--report-only", "--tasks", "piqa"],
            "cannot be combined with --list or --report-only",
        ),
        ([*arguments(path, corpus, tmp_path), "--report-only"], "is finished yet"),
        (["compare", str(path), "--corpus", str(tmp_path / "none"), "--pool", str(tmp_path / "p")], "none"),
        # found before any text is read
        (["compare", str(bad), "--corpus", str(tmp_path / "none")], "relu-seed0: k must be"),
    ):
        assert main(flags) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert error.count("\n") == 0
