"""Equal FLOPs and the tables, on hand-made summaries."""

import json
from dataclasses import replace
from statistics import stdev

import pytest
import torch
import yaml

from remoe.analysis.collect import RoutingRecord
from remoe.analysis.summary import RoutingFigures, RoutingSummary, routing_of
from remoe.compare.budget import matches, steps_for
from remoe.compare.experiment import experiment_from_dict
from remoe.compare.live import Live
from remoe.compare.plots import draw
from remoe.compare.pool import Pool
from remoe.compare.record import RunRecord, ZeroShot, options_of
from remoe.compare.report import markdown
from remoe.compare.results import Results, results
from remoe.errors import ConfigError

EXPERIMENT = {
    "title": "Trial",
    "base": {"steps": 100},
    "seeds": [0, 1],
    "variants": {
        "relu": {},
        "topk": {"router": "topk"},
        "near": {"router": "hash"},
        "wide": {"router": "dense_wide", "equal_flops": False, "seeds": [0]},
    },
}


def finish(pool, run, loss, flops, sparsities=None, speed=50.0):
    """A finished run; S of its steps is 0.875 unless given."""
    folder = pool.folder(run)
    folder.path.mkdir(parents=True)
    folder.config.write_text(yaml.safe_dump(run.config.to_dict()))
    course = enumerate(sparsities or [0.875] * run.steps, 1)
    folder.metrics.write_text(
        "".join(json.dumps({"step": i, "sparsity": s, "tokens_per_second": speed}) + "\n" for i, s in course)
    )
    part = {"loss": loss, "sparsity": 0.875}
    summary = {
        "steps": run.steps, "validation_loss": loss, "validation": {"all": part, "code": {"loss": loss + 1}},
        "total_parameters": 9, "active_parameters": 2, "tokens": 10 * run.steps, "flops": flops,
        "machine": {"cpu": "one" if run.seed else "other", "date": f"2030-01-0{1 + run.seed}"},
        "target_sparsity": 0.875,
        "flops_per_token": flops / (10 * run.steps), "tokens_per_second": 50.0, "peak_memory_bytes": 2**30,
        "settling_step": 7 if run.seed else None, "seconds": 60.0, "router": run.config.router,
    }  # fmt: skip
    folder.summary.write_text(json.dumps(summary))


@pytest.fixture
def pool(tmp_path):
    return Pool(tmp_path, "fingerprint")


@pytest.fixture
def trial():
    return experiment_from_dict(EXPERIMENT, "trial", "trial.yaml")


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
        "all": [record({"target_sparsity": 0.0}, None, sparsity=[0.5] * 6)],  # wants every pair
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


def test_the_list_counts_runs_and_those_that_may_follow(trial, pool):
    live = Live(trial, pool)
    assert live.count() == "0 of 7 runs finished; equal FLOPs asks for up to 4 more"
    flops = {"relu": 1100.0, "topk": 1000.0, "near": 1092.0, "wide": 9000.0}
    for run in trial.runs:
        if run.seed == 0:
            finish(pool, run, 4.0, flops[run.variant])
    assert live.count() == "4 of 8 runs finished; equal FLOPs asks for up to 2 more"  # topk again, near not


def test_the_live_line_shows_the_loss_without_the_penalty(trial, pool):
    live, run = Live(trial, pool), trial.runs[0]
    step = {"step": 3, "loss": 7.5, "lm_loss": 6.5, "sparsity": 0.5, "tokens": 30, "tokens_per_second": 10.0}
    pool.folder(run).path.mkdir()
    pool.folder(run).metrics.write_text(json.dumps(step) + "\n")
    live.started(run)
    assert "loss 6.5000  sparsity" in str(live._line(run))


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
    assert rows["relu"].settling_steps == [None, 7]
    assert rows["topk"].settling_steps == rows["topk"].sparse_steps == []


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


def test_a_run_under_another_label_is_found(pool):
    one = experiment_from_dict({"variants": {"a": {"num_experts": 4}}, "base": {"steps": 5}}, "one", "one")
    two = experiment_from_dict({"variants": {"b": {}}, "base": {"num_experts": 4, "steps": 5}}, "two", "two")
    assert one.runs[0].label != two.runs[0].label
    finish(pool, one.runs[0], 4.0, 1.0)
    assert Pool(pool.path, "fingerprint").summary(two.runs[0])["validation_loss"] == 4.0
    assert Pool(pool.path, "other data").summary(two.runs[0]) is None


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
    with pytest.raises(ConfigError, match=r"trained with optim.beta2 0.5, now 0.95 is asked for"):
        pool.summary(run)
    folder.summary.unlink()
    with pytest.raises(ConfigError, match=r"trained with optim.beta2 0.5, now 0.95 is asked for"):
        pool.state(run)


@pytest.mark.parametrize(("said", "gpu"), [("float32", False), ("bfloat16", True)])
def test_a_run_is_the_same_whether_its_type_is_said_or_its_devices_own(said, gpu, trial, pool, tmp_path):
    one = Pool(tmp_path, "fingerprint", bfloat16=gpu)
    finish(one, trial.runs[0], 4.0, 1.0)
    explicit = experiment_from_dict(EXPERIMENT | {"base": {"steps": 100, "dtype": said}}, "trial", "trial.yaml").runs[0]
    for anywhere in (Pool(tmp_path, "fingerprint"), Pool(tmp_path, "fingerprint", bfloat16=True)):
        assert anywhere.summary(explicit)["validation_loss"] == 4.0
    one.folder(trial.runs[0]).summary.unlink()
    with pytest.raises(ConfigError, match=f"trained with dtype auto, now {said} is asked for"):
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
        with pytest.raises(ConfigError, match="not a whole record"):
            Pool(tmp_path / "other", "fingerprint", records).summary(run)
    RunRecord(options, {"validation_loss": 4.0}, {}, None, data="other").save(path)
    with pytest.raises(ConfigError, match="is the record of a run on other data"):
        Pool(tmp_path / "other", "fingerprint", records).summary(run)
    RunRecord(options | {"optim.beta2": 0.5}, {}, {}, None).save(path)
    with pytest.raises(ConfigError, match=r"trained with optim.beta2 0.5, now 0.95 is asked for"):
        Pool(tmp_path / "other", "fingerprint", records).summary(run)


def test_an_old_record_with_the_routers_default_in_place_of_the_models_option_is_taken(pool):
    asked = {"base": {"model": {"load_balance": False}}, "variants": {"relu": {}}}
    (run,) = experiment_from_dict(asked, "x", "x").runs
    old = options_of(run.config) | {"router_options.load_balance": True}
    RunRecord(old, {"validation_loss": 4.0}, {}, None).save(pool.record_file(run))
    assert pool.summary(run) == {"validation_loss": 4.0}
