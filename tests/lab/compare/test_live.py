"""The table of a comparison that is under way, and its words."""

import io
import json

from finished_run import finish

from remoe.lab.compare.experiment import experiment_from_dict
from remoe.lab.compare.live import Live
from remoe.lab.console import Console, duration


def test_the_list_counts_runs_and_those_that_may_follow(trial, pool):
    live = Live(trial, pool)
    assert live.count() == "0 of 7 runs finished; equal FLOPs needs up to 4 more"
    flops = {"relu": 1100.0, "topk": 1000.0, "near": 1092.0, "wide": 9000.0}
    for run in trial.runs:
        if run.seed == 0:
            finish(pool, run, 4.0, flops[run.variant])
    assert live.count() == "4 of 8 runs finished; equal FLOPs needs up to 2 more"  # topk again, near not


def test_rows_are_told_apart_in_a_narrow_terminal(pool):
    asked = {"variants": {"relu": {}, "topk": {"router": "topk"}}, "seeds": [0, 1], "base": {"steps": 5}}
    axes = {"num_experts": [4, 16], "optim.lr": [0.0015, 0.0025]}
    live = Live(experiment_from_dict(asked | {"axes": axes}, "x", "x"), pool)
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(live.table())
    text = console.file.getvalue()
    assert all(text.count(value) == 4 for value in ("0.0015", "0.0025")), text
    assert text.count(" 16 ") == 4, text


def test_the_live_line_shows_the_loss_without_the_penalty(trial, pool):
    live, run = Live(trial, pool), trial.runs[0]
    step = {"step": 3, "loss": 7.5, "lm_loss": 6.5, "sparsity": 0.5, "tokens": 30, "tokens_per_second": 10.0}
    pool.folder(run).path.mkdir()
    pool.folder(run).metrics.write_text(json.dumps(step) + "\n")
    live.started(run)
    assert "loss 6.5000  sparsity" in str(live._line(run))


def test_durations():
    assert [duration(seconds) for seconds in (7.4, 754, 11109, 3599.7)] == ["0:07", "12:34", "3:05:09", "1:00:00"]
