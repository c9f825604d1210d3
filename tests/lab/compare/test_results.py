"""Equal FLOPs and the tables, on hand-made summaries."""

import json
from dataclasses import replace
from statistics import stdev
from types import SimpleNamespace

import pytest
import torch
from finished_run import EXPERIMENT, finish

from remoe.lab.analysis.collect import RoutingRecord
from remoe.lab.analysis.summary import RoutingFigures, RoutingSummary, routing_of
from remoe.lab.compare.budget import matches, steps_for
from remoe.lab.compare.experiment import experiment_from_dict
from remoe.lab.compare.output import write
from remoe.lab.compare.plots import draw
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.record import RunRecord, ZeroShot, options_of
from remoe.lab.compare.results import Results, _settled, results
from remoe.lab.compare.tables import markdown

HALF = SimpleNamespace(num_tokens=9)
DATA = SimpleNamespace(fingerprint="fingerprint", domains=["code"], train=HALF, validation=HALF)


def test_the_cheaper_run_gets_as_many_steps_as_cost_the_same(trial, pool):
    assert all(match.run is None for match in matches(trial, pool) if match.tokens_run.variant != "relu")
    for run in trial.runs:
        flops = {"relu": 1100.0, "topk": 1000.0, "near": 1092.0, "wide": 9000.0}[run.variant]
        finish(pool, run, 4.0, flops)
    found = {(match.tokens_run.variant, match.tokens_run.seed): match.run for match in matches(trial, pool)}
    assert {variant for variant, _ in found} == {"relu", "topk", "near"}
    assert found["topk", 0].steps == 110
    assert found["topk", 0].config.steps == 110
    assert found["topk", 0].label.endswith("-flops")
    assert found["near", 1].steps == 100  # within 1 %
    assert found["relu", 0] == trial.runs[0]
    assert pool.state(found["topk", 0]) == "not started"


def test_a_dense_stage_is_as_long_in_a_shorter_run(trial, pool):
    """Of 100 steps the first 20 have all experts on; a step costs 40 with one expert of eight, and 60 a further one."""
    relu, topk = (next(run for run in trial.runs if run.variant == name) for name in ("relu", "topk"))
    # 9 parameters, 2 of them active: 8 routed, of which a token in ten meets 1 at S = 0.875: 6 * 10 FLOPs each
    course = [0.0] * 20 + [0.875] * 80
    spent = 20 * (40 + 8 * 60) + 80 * (40 + 60)
    summary = {"steps": 100, "tokens": 1000, "flops": spent, "validation": {"all": {"sparsity": 0.875}}}
    summary |= {"total_parameters": 9, "active_parameters": 2}
    assert steps_for(spent - 30 * 100, summary, course) == 70
    assert steps_for(spent + 7 * 100 + 40, summary, course) == 107
    assert steps_for(20 * 520, summary, course) == 20
    assert steps_for(1, summary, course) == 1
    finish(pool, topk, 4.0, spent, course)
    finish(pool, relu, 4.0, spent - 3000)
    (match,) = [m for m in matches(trial, pool) if m.tokens_run == topk]
    assert match.run.steps == 70
    finish(pool, match.run, 3.5, 1.05 * (spent - 3000))  # it was denser than foreseen
    found = results(trial, pool)
    assert {row.variant: row.over_budget for row in found.equal_flops}["topk"] == pytest.approx(1.05)
    assert "**Note:** topk at equal FLOPs spent 1.050 times the budget" in markdown(trial, found, {}, {}, "Data.")


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

    text = markdown(trial, found, {}, {"A figure": "figures/a.png"}, "Data.")
    assert "| topk | 2 | 100 | 4.4500 ± 0.0707 | +0.3500 ± 0.2121 | 5.4500 ± 0.0707 |" in text
    assert "| near | 1 | 100 | 4.1000 | +0.1000 |" in text
    assert "| topk | 5.450 ± 0.071 |" in text
    assert "Trained on (2030-01-01 to 2030-01-02):\n\n1. cpu other\n2. cpu one\n" in text
    assert "| relu | 1, 2 |" in text
    assert "| near | 1 |" in text
    assert "**Not finished (2):**" in text


def routing(**figures):
    known = {"inactive_experts": 3, "frequency_correlation": None, "sparsity_per_layer": [0.8, 0.9]}
    known |= {"load_imbalance_per_layer": [1.0, 4.0], "specialisation_per_layer": [0.1, 0.4]}
    shown = [[["the", "a|`b"], ["\n"]]]
    return RoutingSummary(RoutingFigures(**known | figures), [], [], [], [], [], shown)


def record(summary, routing, **course):
    steps = {"step": [1, 2, 3, 4, 5, 6], "lambda": [1.0] * 6, "reg_loss": [1.0] * 6, "sparsity": [0.8] * 6}
    return RunRecord(
        {"seed": summary.get("seed", 0)}, {"router": "relu", "target_sparsity": 0.8} | summary, steps | course, routing
    )


def test_means_over_layers_are_weighted_by_pairs():
    figures = routing().figures
    assert figures.over_pairs("load_imbalance") == pytest.approx((2 * 1 + 1 * 4) / 3)
    assert figures.over_pairs("expert_reuse") is None  # not kept
    closed = routing(sparsity_per_layer=[0.8, 1.0], specialisation_per_layer=[0.1, None]).figures
    assert closed.over_pairs("specialisation") == 0.1
    assert (
        routing(sparsity_per_layer=[1.0, 1.0], specialisation_per_layer=[None, None]).figures.over_pairs(
            "specialisation"
        )
        is None
    )


def test_a_short_text_with_rare_tokens_and_a_domain_without_any(trial, tmp_path):
    active_LTE = torch.tensor([[[1, 0], [0, 1], [1, 1], [1, 0]]]).bool()
    tokens, domains, windows = torch.tensor([5, 6, 7, 5]), torch.tensor([0, 0, 2, 2]), torch.tensor([0, 0, 1, 1])
    found = routing_of(RoutingRecord(active_LTE, tokens, domains, windows, ("a", "b", "c")), 1, str)
    assert found.domains == ["a", "c"]
    assert found.share_CLE == [[[0.5, 0.5]], [[1.0, 0.5]]]
    assert found.count_U == []  # none occurs ten times
    run = next(run for run in trial.runs if run.variant == "relu")
    whole = record({"validation_loss": 4.0}, found, lm_loss=[5.0] * 6, sparsity_per_layer=[[0.8]] * 6)
    whole = replace(whole, options=options_of(run.config))
    whole.save(tmp_path / "record.json")
    drawn = draw(trial, Results([], [], [], [], []), {"relu": RunRecord.load(tmp_path / "record.json")}, tmp_path)
    assert any("Fig. 8" in title for title in drawn)
    assert not any("Fig. 7" in title for title in drawn)


def test_a_system_that_looks_ahead_in_training_is_marked(tmp_path):
    variants = {"relu": {}, "choice": {"router": "expert_choice"}}
    trial = experiment_from_dict({"title": "T", "variants": variants}, "trial", "trial.yaml")
    records = {run.variant: record({}, None, lm_loss=[5.0] * 6, sparsity_per_layer=[[0.8]] * 6) for run in trial.runs}
    drawn = draw(trial, Results([], [], [], [], []), records, tmp_path)
    assert "Training loss, first seed (†: chooses among later tokens)" in drawn
    assert "choice†" in (tmp_path / "training-loss.svg").read_text()
    assert "Training loss, first seed" in draw(
        experiment_from_dict({"title": "T", "variants": {"relu": {}}}, "trial", "trial.yaml"),
        Results([], [], [], [], []),
        {"relu": records["relu"]},
        tmp_path,
    )


def test_the_table_of_routing_and_what_it_cannot_know(trial, pool):
    finish(pool, trial.runs[0], 4.0, 1000.0)
    records = {
        "relu": [
            record({}, routing(), flip_rate=[0.6, None, 0.3, None, None, 0.0]),
            record(
                {"seed": 1}, routing(inactive_experts=5, frequency_correlation=-0.5, load_imbalance_per_layer=[3, None])
            ),
        ],
        "topk": [record({"router": "topk"}, routing(sparsity_per_layer=[1.0, 1.0]), reg_loss=[0.0] * 6)],
        "dense": [record({"router": "dense"}, None)],
        "faded": [record({}, None, reg_loss=[1.0, 1.0, 1.0, 1.0, 1.0, 0.0])],
    }
    text = markdown(trial, results(trial, pool), records, {}, "Data.")
    assert (
        "| relu | 2 | 4 ± 1 | 2.50 ± 0.71 | 0.2000 ± 0.0000 | -0.50 |  |  | 0.30000 | 0.00000 | 0.800 0.900 |" in text
    )
    assert "| topk | 1 | 3 |  |  |  |  |  | not measured | not measured | 1.000 1.000 |" in text
    assert "`validate: {flips_every: N}`" in text
    assert "| 0 | 0 | `the` `` a\\|`b `` |\n| 0 | 1 | `\\n` |" in text
    size = "under 1e-06 nats in 33% of the steps of the second half of its sparse stage"
    assert f"**Note:** the penalty of faded, seed 0, is {size}: nothing steers S there." in text
    assert text.count("**Note:**") == 1
    assert "| dense |" not in text
    assert "flips_every" not in markdown(trial, results(trial, pool), {"relu": records["relu"][:1]}, {}, "Data.")


def test_a_penalty_that_still_rises_steers_nothing_yet(trial, pool):
    rising = {"lambda": [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]}
    records = {
        "late": [record({}, None, sparsity=[0.5] * 4 + [0.8, 0.8], **rising)],
        "short": [record({"seed": 3}, None, sparsity=[0.5] * 6, **rising)],
        "fades": [record({}, None, sparsity=[0.5] * 2 + [0.8] * 4, **{"lambda": [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]})],
        "all": [record({"target_sparsity": 0.0}, None, sparsity=[0.5] * 6, reg_loss=[0.0] * 6)],  # wants every pair
    }
    records["held"] = [replace(records["short"][0], options={"seed": 3, "sparsity.rule": "none"})]
    text = markdown(trial, results(trial, pool), records, {}, "Data.")
    notes = [line for line in text.split("\n") if line.startswith("**Note:**")]
    assert notes == [
        "**Note:** short, seed 3, never became sparse (S 0.50 at its end, wanted 0.8): too few steps; "
        "its losses say nothing yet about routers.",
        "**Note:** the penalty of fades, seed 0, is under 1e-06 nats in 50% of the steps of the second half of its "
        "sparse stage: nothing steers S there.",
        "**Note:** held, seed 3, never became sparse (S 0.50 at its end, wanted 0.8): lambda stays as it is; "
        "its losses say nothing yet about routers.",
    ]


def test_without_others_there_is_no_second_table(pool):
    alone = experiment_from_dict({"base": {"steps": 100}, "variants": {"relu": {}}}, "trial", "trial.yaml")
    finish(pool, alone.runs[0], 4.0, 1000.0)
    assert matches(alone, pool) == results(alone, pool).equal_flops == []
    two = experiment_from_dict({**EXPERIMENT, "seeds": [0]}, "trial", "trial.yaml")  # the others are not finished
    assert [row.variant for row in results(two, pool).equal_tokens] == ["relu"]
    assert results(two, pool).equal_flops == []


def test_options_of_a_run_say_what_its_router_was_built_with():
    asked = {"base": {"model": {"load_balance": False}}, "variants": {"relu": {}, "norm": {"router": "relu_norm"}}}
    options = {run.variant: options_of(run.config) for run in experiment_from_dict(asked, "x", "x").runs}
    assert options["relu"]["router_options.load_balance"] is False
    assert options["relu"]["router_options.load_balance_power"] == 1.0
    assert "router_options.locality" in options["norm"]


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


def test_a_pool_of_somebody_else_can_be_reported(trial, pool, monkeypatch, tmp_path, caplog):
    def refused(*_):
        raise PermissionError(13, "Permission denied", "pool/.0.lock")

    for run in trial.runs:
        finish(pool, run, 4.0, 1000.0)
    monkeypatch.setattr(Pool, "claimed", refused)
    assert "| relu | 2 | 100 | 4.0000 " in write(trial, pool, DATA, tmp_path / "out", "cpu").read_text()
    assert "Permission denied: 'pool/.0.lock'" in caplog.text


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
    text = markdown(trial, found, {}, {}, "Data.")
    assert "| relu | 2 | 500 | 0.375 ± 0.177 | 0.375 ± 0.177 |" in text
    assert "| topk | 1 | 500 | 0.250 | 0.250 |" in text


@pytest.mark.parametrize(
    ("tasks", "header", "relu", "topk", "guessing"),
    [
        (("piqa", "arc"), "mean", "0.400 | 0.600 | 0.500", "0.500 | 0.500 | 0.500", "0.500 | 0.250 | 0.375"),
        (("piqa",), "mean of piqa", "0.400 | 0.600 | 0.400", "0.500 |  | 0.500", "0.500 | 0.250 | 0.500"),
        (("boolq",), "mean of none", "0.400 | 0.600 |  | ", " |  | 0.500 | ", "0.500 | 0.250 | 0.500 | "),
    ],
)
def test_the_mean_accuracy_is_over_the_tasks_that_all_have(tasks, header, relu, topk, guessing, trial, pool):
    accuracy = {"relu": {"piqa": 0.4, "arc": 0.6}, "topk": dict.fromkeys(tasks, 0.5)}
    for run in trial.runs[:2]:
        finish(pool, run, 4.0, 1000.0)
        found = {
            task: {"acc": a, "chance": 0.25 if task == "arc" else 0.5} for task, a in accuracy[run.variant].items()
        }
        known = RunRecord(options_of(run.config), pool.summary(run), {"step": [100], "sparsity": [0.875]}, None)
        replace(known, zero_shot=ZeroShot(None, found)).save(pool.record_file(run))
    text = markdown(trial, results(trial, Pool(pool.path, "fingerprint")), {}, {}, "Data.")
    assert f" | {header} |\n" in text
    for line in (f"| relu | 1 | all | {relu} |", f"| topk | 1 | all | {topk} |", f"| guessing |  |  | {guessing} |"):
        assert line in text


def test_what_does_not_compare_is_said(pool):
    variants = {"relu": {}, "choice": {"router": "expert_choice", "router_options": {"causal_evaluation": False}}}
    variants["own"] = {"router": "lory", "router_options": {"first_segment": "own"}}
    trial = experiment_from_dict({"base": {"steps": 100}, "variants": variants}, "trial", "trial.yaml")
    for run in trial.runs:
        finish(pool, run, 4.0, 1000.0)
    text = markdown(trial, results(trial, pool), {}, {}, "Data.")
    notes = [line for line in text.split("\n") if line.startswith("**Note:** tokens of")]
    assert [note.split()[3] for note in notes] == ["choice", "own"]


def test_every_seed_that_misses_its_budget_is_named(trial, pool):
    for run in trial.runs:
        finish(pool, run, 4.0, {"topk": 800.0}.get(run.variant, 1000.0))
    for match in matches(trial, pool):
        if match.run.steps != 100:
            finish(pool, match.run, 4.0, 1050.0 if match.run.seed else 950.0)  # their mean is the budget
    text = markdown(trial, results(trial, pool), {}, {}, "Data.")
    assert "**Note:** topk at equal FLOPs spent 0.950, 1.050 times the budget" in text


def test_a_figure_of_first_seeds_leaves_out_a_system_whose_first_is_missing(trial, pool, tmp_path, monkeypatch):
    for run in trial.runs:
        if run.variant == "topk" or (run.variant == "relu" and run.seed):
            finish(pool, run, 4.0, 1000.0)
            known = RunRecord(options_of(run.config), pool.summary(run), {"step": [100], "sparsity": [0.875]}, None)
            known.save(pool.record_file(run))
    drawn = {}
    output = "remoe.lab.compare.output"
    monkeypatch.setattr(f"{output}.draw", lambda _, __, records, folder: folder.mkdir() or drawn | records)
    monkeypatch.setattr(f"{output}._remove_others", lambda folder, _: None)
    monkeypatch.setattr(f"{output}.markdown", lambda _, __, records, shown, ___: f"{[*records]} {[*shown]}")
    report = write(trial, Pool(pool.path, "fingerprint"), DATA, tmp_path / "out", "cpu")
    assert report.read_text() == "['topk', 'relu'] ['topk']"


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
