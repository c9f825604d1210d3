"""The numbers of a comparison, on hand-made summaries."""

import json
from dataclasses import replace
from statistics import stdev

import pytest
from finished_run import EXPERIMENT, finish

from remoe.lab.compare.budget import matches
from remoe.lab.compare.experiment import experiment_from_dict
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.record import RunRecord, ZeroShot, options_of
from remoe.lab.compare.results import _settled, results


def test_what_is_computed_twice_is_shown_beside_the_flops(trial, pool):
    """Of 8 routed weights a layer keeps 1.25 times the wanted eighth; two thirds of them are up projections."""
    relu, topk = (next(run for run in trial.runs if run.variant == name) for name in ("relu", "topk"))
    finish(pool, relu, 4.0, 1e5)
    finish(pool, topk, 4.0, 8e4)
    course = [[0.5, 0.875]] * 20 + [[0.75, 1.0]] * 80
    metrics = pool.folder(relu).metrics
    steps = [json.loads(line) | {"sparsity_per_layer": s} for line, s in zip(metrics.open(), course, strict=True)]
    metrics.write_text("".join(json.dumps(step) + "\n" for step in steps))
    again = 8 * (20 * (0.5 - 0.15625) + 80 * (0.25 - 0.15625)) / 2  # weights, of two equal layers, the first alone
    rows = {row.variant: row for row in results(trial, pool).equal_tokens}
    assert rows["relu"].over_budget_executed == 1
    assert rows["topk"].over_budget == pytest.approx(0.8)
    assert rows["topk"].over_budget_executed == pytest.approx(8e4 / (1e5 + 10 * 2 * 2 / 3 * again))


def test_rows_are_means_over_the_seeds_that_are_finished(trial, pool):
    losses = {"relu": [4.0, 4.2], "topk": [4.5, 4.4], "near": [4.1], "wide": [3.0]}
    for run in trial.runs:
        if run.seed < len(losses[run.variant]):
            finish(pool, run, losses[run.variant][run.seed], 1000.0)
    found = results(trial, pool)
    rows = {row.variant: row for row in found.equal_tokens}
    assert rows["topk"].validation_loss.mean == pytest.approx(4.45)
    assert rows["topk"].validation_loss.deviation == pytest.approx(stdev([4.5, 4.4]))
    assert rows["topk"].over_reference.values == pytest.approx([0.5, 0.2])  # seed by seed
    assert rows["topk"].domains["code"].mean == pytest.approx(5.45)
    assert rows["near"].validation_loss.deviation is None
    assert rows["relu"].over_reference is None
    assert found.missing == ["tiny-hash-seed1", "tiny-hash-seed1 at equal FLOPs"]
    assert [row.variant for row in found.equal_flops] == ["relu", "topk", "near"]
    assert (found.dates, found.machines) == (["2030-01-01", "2030-01-02"], ["cpu other", "cpu one"])
    assert (rows["relu"].machines, rows["near"].machines) == ([0, 1], [0])


def test_without_others_there_is_no_second_table(pool):
    alone = experiment_from_dict({"base": {"steps": 100}, "variants": {"relu": {}}}, "trial", "trial.yaml")
    finish(pool, alone.runs[0], 4.0, 1000.0)
    assert matches(alone, pool) == results(alone, pool).equal_flops == []
    two = experiment_from_dict({**EXPERIMENT, "seeds": [0]}, "trial", "trial.yaml")  # the others are not finished
    assert [row.variant for row in results(two, pool).equal_tokens] == ["relu"]
    assert results(two, pool).equal_flops == []


def test_stages_are_of_steered_routers_alone(trial, pool):
    for run in trial.runs:
        finish(pool, run, 4.0, 1000.0, [0.875] * 50 + [0.9] * 50)
    rows = {row.variant: row for row in results(trial, pool).equal_tokens}
    assert rows["relu"].settling_steps == [None, 7]  # as the runs found
    assert rows["topk"].settling_steps == rows["topk"].sparse_steps == []


def test_of_many_experts_an_old_run_counted_as_settled_too_early():
    closed = {"target_sparsity": 1 - 1 / 128, "settling_step": 3}  # a band of 0.01 holds the sparsity of no pairs
    assert _settled(closed, [0.5] * 2 + [1.0] * 60) is None
    assert _settled(closed, [0.5] * 2 + [1.0] * 60 + [1 - 1 / 128] * 50) == 63
    assert _settled(closed | {"target_sparsity": 0.875}, [0.875] * 60) == 3


def test_zero_shot_accuracies_are_those_of_as_many_rows(trial, pool):
    rows_of = {("relu", 0): 500, ("relu", 1): 500, ("topk", 0): 500, ("near", 0): 500, ("near", 1): 200}
    for run in trial.runs:
        finish(pool, run, 4.0, 1000.0)
        if rows := rows_of.get((run.variant, run.seed)):
            result = {"acc": 0.25 + run.seed / 4, "chance": 0.5}
            found = RunRecord(options_of(run.config), pool.summary(run), {"step": [100], "sparsity": [0.875]}, None)
            replace(found, zero_shot=ZeroShot(rows, {"piqa": result})).save(pool.record_file(run))
    found = results(trial, Pool(pool.path, "fingerprint"))
    accuracy = {row.variant: row.zero_shot["piqa"].values for row in found.equal_tokens if row.zero_shot}
    assert accuracy == {"relu": [0.25, 0.5], "topk": [0.25], "near": [0.25]}


def test_one_run_of_several_points_is_missing_once(pool):
    asked = {"variants": {"relu": {"num_experts": 4}}, "axes": {"num_experts": [4, 8, 16]}, "base": {"steps": 5}}
    assert results(experiment_from_dict(asked, "x", "x"), pool).missing == ["tiny-relu-num_experts4-seed0"]


def test_a_seed_whose_summary_has_less_does_not_stop_the_report(trial, pool):
    for run in trial.runs:
        finish(pool, run, 4.0, 1000.0)
        if run.seed:
            summary = json.loads(pool.folder(run).summary.read_text())
            del summary["machine"]
            pool.folder(run).summary.write_text(json.dumps(summary))
    assert results(trial, pool).machines == ["cpu other", "not recorded"]


def test_a_model_without_stages_spends_no_time_before_the_third(trial, pool):
    run = next(run for run in trial.runs if run.variant == "wide")
    finish(pool, run, 4.0, 1000.0)
    folder = pool.folder(run)
    folder.summary.write_text(json.dumps(json.loads(folder.summary.read_text()) | {"target_sparsity": 0.0}))
    (row,) = results(trial, pool).equal_tokens
    assert row.minutes is not None
    assert row.dense_minutes is None


def test_the_course_of_s_and_the_time_of_its_stages(trial, pool):
    course = [0.5] * 40 + [0.7] * 20 + [0.87, 0.88] * 20
    longer = experiment_from_dict({**EXPERIMENT, "base": {"steps": 102}}, "trial", "trial.yaml")
    finish(pool, longer.runs[0], 4.0, 1000.0, [*course, 0.9, 0.7], speed=5.0)
    (row,) = results(longer, pool).equal_tokens
    assert row.sparse_steps == [61]
    assert row.minutes == pytest.approx(102 * 2 / 60)
    assert row.dense_minutes == pytest.approx(60 * 2 / 60)
    assert (row.late_sparsity, row.late_deviation) == pytest.approx((0.8, stdev([0.9, 0.7])))
    assert results(trial, pool).equal_tokens == []
