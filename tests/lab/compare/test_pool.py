"""The pool of runs: what counts as finished, and what becomes of a record."""

import json
import shutil
import sys
import tarfile
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import yaml
from finished_run import EXPERIMENT, finish, whole

from remoe.errors import ConfigError
from remoe.lab.compare.experiment import experiment_from_dict, load_experiment
from remoe.lab.compare.pool import Pool, Tasks
from remoe.lab.compare.record import DataDescription, RunRecord, options_of
from remoe.lab.training.folder import RunFolder


def test_a_run_under_another_label_is_found(pool):
    one = experiment_from_dict({"variants": {"a": {"num_experts": 4}}, "base": {"steps": 5}}, "one", "one")
    two = experiment_from_dict({"variants": {"b": {}}, "base": {"num_experts": 4, "steps": 5}}, "two", "two")
    assert one.runs[0].label != two.runs[0].label
    finish(pool, one.runs[0], 4.0, 1.0)
    assert Pool(pool.path, "fingerprint").summary(two.runs[0])["validation_loss"] == 4.0
    assert Pool(pool.path, "other data").summary(two.runs[0]) is None


def test_a_moving_table_reads_a_finished_runs_metrics_once_and_the_record_when_it_is_there(trial, pool):
    run = trial.runs[0]
    finish(pool, run, 4.0, 1.0)
    assert pool.summary(run)["validation_loss"] == 4.0
    pool.folder(run).metrics.unlink()
    assert pool.summary(run)["validation_loss"] == 4.0
    other = Pool(pool.path, "fingerprint")  # as another process, which makes the record
    record = whole(pool, run)
    other._save(run, RunRecord(record.options, record.summary | {"validation_loss": 3.0}, record.course, None))
    assert pool.summary(run)["validation_loss"] == 3.0


def test_half_a_summary_is_no_summary_and_other_defaults_are_refused(trial, pool):
    run = trial.runs[0]
    finish(pool, run, 4.0, 1.0)
    folder = pool.folder(run)
    whole = folder.summary.read_text()
    folder.summary.write_text(whole[:40])
    assert pool.state(run) == "unfinished"
    folder.summary.write_text(whole)
    config = run.config.to_dict()
    config["optim"]["beta2"] = 0.5  # as if the preset had had this when the run was made
    folder.config.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"trained with optim.beta2 0.5, but 0.95 is requested"):
        pool.summary(run)
    folder.summary.unlink()
    with pytest.raises(ConfigError, match=r"trained with optim.beta2 0.5, but 0.95 is requested"):
        pool.state(run)


@pytest.mark.parametrize(("said", "gpu"), [("float32", False), ("bfloat16", True)])
def test_a_run_is_the_same_whether_its_type_is_said_or_its_devices_own(said, gpu, trial, pool, tmp_path):
    one = Pool(tmp_path, "fingerprint", bfloat16=gpu)
    finish(one, trial.runs[0], 4.0, 1.0)
    explicit = experiment_from_dict(EXPERIMENT | {"base": {"steps": 100, "dtype": said}}, "trial", "trial.yaml").runs[0]
    for anywhere in (Pool(tmp_path, "fingerprint"), Pool(tmp_path, "fingerprint", bfloat16=True)):
        assert anywhere.summary(explicit)["validation_loss"] == 4.0
    one.folder(trial.runs[0]).summary.unlink()
    with pytest.raises(ConfigError, match=f"trained with dtype auto, but {said} is requested"):
        one.state(explicit)  # unfinished, it would go on with what auto means on another device
    assert Pool(tmp_path, "fingerprint", bfloat16=not gpu).state(trial.runs[0]) == "not started"  # another result


def test_a_record_stands_for_its_run_and_may_lack_an_option_that_came_later(trial, pool, tmp_path):
    run, records = trial.runs[0], tmp_path / "records"
    records.mkdir()
    options = options_of(run.config)
    del options["optim.clip"]
    path = records / f"{pool.name(run)}.json"
    RunRecord(options, {"validation_loss": 4.0}, {"step": [2, 4], "sparsity": [0.5, 0.75]}, None).save(path)
    assert Pool(tmp_path / "other", "fingerprint", records).sparsities(run) == [0.5, 0.5, 0.75, 0.75]
    assert Pool(tmp_path / "other", "fingerprint", records).summary(run) == {"validation_loss": 4.0}
    assert Pool(tmp_path / "other", "fingerprint").summary(run) is None
    later = json.loads(path.read_text()) | {"unheard_of": 1}
    path.write_text(json.dumps(later))
    assert Pool(tmp_path / "other", "fingerprint", records).summary(run) == {"validation_loss": 4.0}
    for damaged in (json.dumps(later)[:60], "{}", "[]"):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match="not a complete record"):
            Pool(tmp_path / "other", "fingerprint", records).summary(run)
    RunRecord(options, {"validation_loss": 4.0}, {}, None, data="other").save(path)
    with pytest.raises(ConfigError, match="is the record of a run on other data"):
        Pool(tmp_path / "other", "fingerprint", records).summary(run)
    RunRecord(options | {"optim.beta2": 0.5}, {}, {}, None).save(path)
    with pytest.raises(ConfigError, match=r"trained with optim.beta2 0.5, but 0.95 is requested"):
        Pool(tmp_path / "other", "fingerprint", records).summary(run)


@pytest.mark.parametrize("effective", [{"model.load_balance": False}, {"router_options.load_balance": False}])
def test_a_record_of_0_1_0_is_compared_by_the_option_that_counted(pool, effective):
    """The other of the two old options has its default."""
    (run,) = experiment_from_dict({"variants": {"relu": {"router_options": {"load_balance": False}}}}, "x", "x").runs
    old = {name: value for name, value in options_of(run.config).items() if "load_balance" not in name}
    old |= {"model.load_balance": True, "router_options.load_balance": True, "model.experts_backend": "auto"}
    write_old(pool.record_file(run), old | effective)
    assert pool.summary(run) == {"validation_loss": 4.0}
    write_old(pool.record_file(run), old)
    with pytest.raises(ConfigError, match=r"trained with router_options.load_balance True, but False is requested"):
        Pool(pool.path, "fingerprint").summary(run)


def write_old(path, options):
    """A record as 0.1.0 wrote it."""
    old = {"options": options, "summary": {"validation_loss": 4.0}, "course": {}, "routing": None}
    path.write_text(json.dumps(old))


@pytest.fixture(scope="module")
def fixture_0_1_0(pytestconfig, tmp_path_factory):
    """The experiment and the records of version 0.1.0."""
    folder = tmp_path_factory.mktemp("version-0.1.0")
    with tarfile.open(pytestconfig.rootpath / "tests" / "fixtures" / "version-0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_records_of_0_1_0_are_found_loose_and_packed(fixture_0_1_0, tmp_path):
    experiment = load_experiment(fixture_0_1_0 / "experiment.yaml", {"model.router_std": None})  # as then
    records = tmp_path / "records"
    shutil.copytree(fixture_0_1_0 / "records", records)
    files = sorted(records.glob("*.json"))
    data = json.loads(files[0].read_text())["data"]
    for packed in (False, True):
        pool = Pool(tmp_path / "pool", data, records)
        runs = [run for run in experiment.runs if pool.has_record(run)]
        assert {pool.record_name(run) for run in runs} == {path.stem for path in files}
        assert {run.variant for run in runs} >= {"relu", "capped"}  # capped sets model.load_balance
        if not packed:
            description = DataDescription(data, ["a"], 1, 1)
            pool.records.pack("old", [path.stem for path in files], description)
    assert [path.name for path in records.iterdir()] == ["old.jsonl.xz"]


@pytest.mark.parametrize(
    ("router", "hashed"), [("relu", "7a7494ec"), ("relu", "f83fa2af"), ("topk", "fd565ea4"), ("topk", "0530cc65")]
)
def test_a_run_is_found_by_each_hash_that_0_1_0_gave_it(pool, router, hashed):
    """With relu's options on the model and on the router; topk without and with the option that it ignored."""
    relu = {"router_options": {"load_balance": False, "max_experts_per_token": 4}, "model": {"router_std": None}}
    (run,) = experiment_from_dict(
        {"variants": {"x": {"router": router} | (relu if router == "relu" else {})}}, "x", "x"
    ).runs
    write_old(pool.path / f"any-{hashed}.json", options_of(run.config))
    assert pool.record_name(run) == f"any-{hashed}"
    assert pool.has_record(run)


def test_a_record_counts_whatever_an_unfinished_folder_is_called(tmp_path):
    """The folder was begun under one label, the record came from where the run has another."""
    one = experiment_from_dict({"variants": {"a": {"num_experts": 4}}, "base": {"steps": 5}}, "one", "one")
    two = experiment_from_dict({"variants": {"b": {}}, "base": {"num_experts": 4, "steps": 5}}, "two", "two")
    for label, begun, ended in (("first", one, two), ("last", two, one)):
        pool = Pool(tmp_path / label, "data", tmp_path / f"records-{label}")
        pool.folder(begun.runs[0]).path.mkdir(parents=True)
        elsewhere = Pool(tmp_path / f"elsewhere-{label}", "data")
        finish(elsewhere, ended.runs[0], 4.0, 1.0)
        pool.records.save(elsewhere.record_name(ended.runs[0]), whole(elsewhere, ended.runs[0]))
        known = Pool(pool.path, "data", pool.records.path)
        assert known.state(begun.runs[0]) == "finished"
        assert known.folder(begun.runs[0]).path.exists()


@dataclass
class Accuracy:
    acc: float


@pytest.fixture
def asked(monkeypatch, trial, pool):
    """Evaluations as (tasks, rows), of a run that is finished and has a checkpoint; and a pool that asks for tasks."""
    run, made = trial.runs[0], []
    finish(pool, run, 4.0, 1.0)
    whole(pool, run).save(pool.record_file(run))
    monkeypatch.setattr(RunFolder, "last_checkpoint", lambda folder: folder.path / f"step-{run.steps:08d}")

    def evaluate_model(path, tasks, *, limit, device, after):
        for name in tasks:
            made.append((name, limit))
            if not after(name, Accuracy(0.5)):
                break

    zeroshot = SimpleNamespace(evaluate_model=evaluate_model)
    monkeypatch.setitem(sys.modules, "remoe.lab.evaluation.zeroshot", zeroshot)

    def pool_for(names, limit):
        return Pool(pool.path, "fingerprint", tasks=Tasks(dict.fromkeys(names), limit))

    return run, made, pool_for


def test_a_quick_look_at_a_few_rows_takes_nothing_from_a_record(asked):
    run, made, pool_for = asked
    pool_for(["piqa", "boolq"], None).add_tasks(run, "cpu")
    quick = pool_for(["piqa"], 10)
    assert quick.recorded(run)
    quick.add_tasks(run, "cpu")
    assert made == [("piqa", None), ("boolq", None)]
    further = pool_for(["piqa", "arc_easy"], 10)
    assert not further.recorded(run)
    further.add_tasks(run, "cpu")
    found = further.zero_shot(run)
    assert made[2:] == [("arc_easy", None)]  # on as many rows as the others
    assert (found.limit, [*found.tasks]) == (None, ["piqa", "boolq", "arc_easy"])


def test_the_checkpoint_of_an_unfinished_run_is_not_the_recorded_model(asked, monkeypatch):
    run, made, pool_for = asked
    monkeypatch.setattr(RunFolder, "last_checkpoint", lambda folder: folder.path / "step-00000001")
    pool = pool_for(["piqa"], None)
    pool.add_tasks(run, "cpu")
    assert pool.recorded(run)
    assert made == []


def test_more_rows_take_the_place_of_fewer(asked):
    run, made, pool_for = asked
    pool_for(["piqa", "boolq"], 10).add_tasks(run, "cpu")
    more = pool_for(["piqa"], 20)
    more.add_tasks(run, "cpu")
    found = more.zero_shot(run)
    assert (found.limit, [*found.tasks]) == (20, ["piqa"])
    assert made[2:] == [("piqa", 20)]


def test_tasks_that_were_finished_before_a_signal_are_kept(asked):
    run, made, pool_for = asked
    pool = pool_for(["piqa", "boolq"], None)
    pool.add_tasks(run, "cpu", stop=lambda: len(made) == 1)
    assert not pool.recorded(run)
    pool_for(["piqa", "boolq"], None).add_tasks(run, "cpu")
    assert made == [("piqa", None), ("boolq", None)]
