"""The files that a comparison writes, and the committed ones, which are made from the committed records."""

import json
import re
from dataclasses import replace

import pytest
import torch
from finished_run import DATA, cells, finish, record, whole

from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.analysis.summary import routing_of
from remoe.lab.compare import output
from remoe.lab.compare.experiment import experiment_from_dict, load_experiment
from remoe.lab.compare.output import draw, pack_records, write
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.record import RecordFolder, RunRecord, options_of
from remoe.lab.compare.results import Results

NOTHING = Results([], [], [], [], [])


def test_a_short_text_with_rare_tokens_and_a_domain_without_any(trial, tmp_path):
    active_LTE = torch.tensor([[[1, 0], [0, 1], [1, 1], [1, 0]]]).bool()
    tokens, domains, windows = torch.tensor([5, 6, 7, 5]), torch.tensor([0, 0, 2, 2]), torch.tensor([0, 0, 1, 1])
    found = routing_of(RoutingRecord.of(active_LTE, tokens, domains, windows, ("a", "b", "c")), str)
    assert found.domains == ["a", "c"]
    assert found.share_CLE == [[[0.5, 0.5]], [[1.0, 0.5]]]
    assert found.count_U == []  # none occurs ten times
    run = next(run for run in trial.runs if run.variant == "relu")
    made = record({"validation_loss": 4.0}, found, lm_loss=[5.0] * 6, sparsity_per_layer=[[0.8]] * 6)
    replace(made, options=options_of(run.config)).save(tmp_path / "record.json")
    drawn = draw(trial, NOTHING, {"relu": RunRecord.load(tmp_path / "record.json")}, tmp_path)
    assert any("Fig. 8" in title for title in drawn)
    assert not any("Fig. 7" in title for title in drawn)


@pytest.mark.slow
def test_a_system_that_looks_ahead_in_training_is_marked(tmp_path):
    variants = {"relu": {}, "choice": {"router": "expert_choice"}}
    trial = experiment_from_dict({"title": "T", "variants": variants}, "trial", "trial.yaml")
    records = {run.variant: record({}, None, lm_loss=[5.0] * 6, sparsity_per_layer=[[0.8]] * 6) for run in trial.runs}
    assert any("†" in title for title in draw(trial, NOTHING, records, tmp_path))
    assert "choice†" in (tmp_path / "training-loss.svg").read_text()
    alone = experiment_from_dict({"title": "T", "variants": {"relu": {}}}, "trial", "trial.yaml")
    assert not any("†" in title for title in draw(alone, NOTHING, {"relu": records["relu"]}, tmp_path))


def test_a_pool_of_somebody_else_can_be_reported(trial, pool, monkeypatch, tmp_path, caplog):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "pool/.0.lock")

    for run in trial.runs:
        finish(pool, run, 4.0, 1000.0)
    monkeypatch.setattr(Pool, "claimed", refused)
    report = write(trial, pool, DATA, tmp_path / "out", "cpu", dataset=object())
    assert cells(report.read_text(), "validation loss")["relu"]["validation loss"].startswith("4.0000")
    assert "Permission denied: 'pool/.0.lock'" in caplog.text


def test_a_figure_of_first_seeds_leaves_out_a_system_whose_first_is_missing(trial, pool, tmp_path, monkeypatch):
    for run in trial.runs:
        if run.variant == "topk" or (run.variant == "relu" and run.seed):
            finish(pool, run, 4.0, 1000.0)
            course = {"step": [100], "sparsity": [0.875], "lambda": [1.0], "reg_loss": [1.0]}
            replace(whole(pool, run), course=course).save(pool.record_file(run))
    given = {}
    monkeypatch.setattr(output, "draw", lambda _, __, records, folder: folder.mkdir() or given.update(records) or {})
    report = write(trial, Pool(pool.path, "fingerprint"), DATA, tmp_path / "out", "cpu")
    assert [*cells(report.read_text(), "validation loss")] == ["relu", "topk"]
    assert [*given] == ["topk"]


def test_finished_runs_are_packed_once_and_a_folder_without_permission_stays_as_it_is(
    trial, pool, tmp_path, monkeypatch, caplog
):
    for run in trial.runs[:3]:
        finish(pool, run, 4.0, 1000.0)
    kept = Pool(pool.path, "fingerprint", tmp_path / "records")
    for run in trial.runs[:2]:
        kept._save(run, whole(pool, run))

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as context:
        context.setattr(RecordFolder, "pack", refused)
        pack_records(trial, kept, DATA)
    assert "stay unpacked" in caplog.text
    pack_records(trial, kept, DATA)
    assert [path.name for path in kept.records.path.iterdir()] == ["trial.jsonl.xz"]
    before = (kept.records.path / "trial.jsonl.xz").stat().st_mtime_ns
    pack_records(trial, kept, DATA)
    assert (kept.records.path / "trial.jsonl.xz").stat().st_mtime_ns == before
    fresh = Pool(tmp_path / "elsewhere", "fingerprint", kept.records.path)
    assert [fresh.has_record(run) for run in trial.runs[:3]] == [True, True, False]


def test_every_committed_record_is_found_by_its_key_of_0_1_0(pytestconfig, tmp_path):
    root = pytestconfig.rootpath / "experiments"
    folder = RecordFolder(root / "results" / "records")
    pools = [Pool(tmp_path, data.fingerprint, folder.path) for data in folder.data()]
    names, missing, found = {*folder.names()}, [], set()
    for file in sorted(root.glob("*.yaml")):
        if file.stem == "gpu":  # not run yet
            continue
        for run in load_experiment(file).runs:
            keys = {pool.record_name(run) for pool in pools}
            found |= keys
            missing += [(file.stem, run.variant, run.seed)] if not keys & names else []
    assert missing == [("long", "topk", 2)]
    assert {name for name in names - found if not name.endswith("-flops", 0, -9)} == set()


@pytest.mark.parametrize("name", ["control", "long", "muon"])
def test_committed_tables_are_made_from_the_committed_records(name, pytestconfig, tmp_path, monkeypatch):
    root = pytestconfig.rootpath / "experiments"
    monkeypatch.setattr(output, "draw", lambda _, __, ___, folder: folder.mkdir() or {})
    folder, experiment = RecordFolder(root / "results" / "records"), load_experiment(root / f"{name}.yaml")
    pools = [(Pool(tmp_path / "pool", data.fingerprint, folder.path), data) for data in folder.data()]
    pool, data = next(pair for pair in pools if pair[0].has_record(experiment.runs[0]))
    report = write(experiment, pool, data, tmp_path / "out", "cpu")
    assert report.read_text() == (root / "results" / name / "results.md").read_text()
    ours, theirs = (
        json.loads((path / "results.json").read_text()) for path in (report.parent, root / "results" / name)
    )
    assert ours == theirs


def test_pictures_in_documents_are_kept_and_results_stay_small(pytestconfig):
    root = pytestconfig.rootpath
    documents = [root / "README.md", *(root / "docs").rglob("*.md")]
    shown = {
        (document.parent / link).resolve()
        for document in documents
        for link in re.findall(r"\]\(([^)]*experiments/results/[^)]+\.png)\)", document.read_text())
    }
    results = root / "experiments" / "results"
    ignored = (results / ".gitignore").read_text().split("\n")
    kept = {results / line[1:] for line in ignored if line.startswith("!")}
    assert shown
    assert shown == kept
    tables = [path for path in results.rglob("*") if path.suffix in (".md", ".json", ".xz")]
    assert sum(path.stat().st_size for path in [*kept, *tables]) < 5_000_000
