"""Equal FLOPs: which runs are trained again, and with how many steps."""

import pytest
from finished_run import finish

from remoe.lab.compare.budget import known_runs, matches, steps_for
from remoe.lab.compare.results import results


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


def test_known_runs_are_those_at_equal_tokens_then_those_at_equal_flops(trial, pool):
    assert known_runs(trial, pool) == trial.runs
    for run in trial.runs:
        finish(pool, run, 4.0, {"topk": 800.0}.get(run.variant, 1000.0))
    *tokens, first, second = known_runs(trial, pool)
    assert tokens == trial.runs
    assert [(run.variant, run.seed, run.steps) for run in (first, second)] == [("topk", 0, 125), ("topk", 1, 125)]
