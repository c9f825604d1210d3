"""Runs of a comparison that look finished, by hand: no training."""

import json

import yaml

from remoe.lab.analysis.summary import RoutingFigures, RoutingSummary
from remoe.lab.compare.record import DataDescription, RunRecord, options_of

DATA = DataDescription("fingerprint", ["code"], 2000, 9)
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


def whole(pool, run):
    """The record of a finished run; its routing is left out."""
    return RunRecord(options_of(run.config), pool.summary(run), {"step": [5], "sparsity": [0.875]}, None)


def routing(**figures):
    """The routing of a run of two layers; what it does not have is left out."""
    known = {"inactive_experts": 3, "frequency_correlation": None, "sparsity_per_layer": [0.8, 0.9]}
    known |= {"load_imbalance_per_layer": [1.0, 4.0], "specialisation_per_layer": [0.1, 0.4]}
    shown = [[["the", "a|`b"], ["\n"]]]
    return RoutingSummary(RoutingFigures(**known | figures), [], [], [], [], [], shown)


def record(summary, routing, **course):
    """The record of a run of six steps."""
    steps = {"step": [1, 2, 3, 4, 5, 6], "lambda": [1.0] * 6, "reg_loss": [1.0] * 6, "sparsity": [0.8] * 6}
    return RunRecord(
        {"seed": summary.get("seed", 0)}, {"router": "relu", "target_sparsity": 0.8} | summary, steps | course, routing
    )


def cells(text, column):
    """The cells of the first table of a report that has `column`: {first cell of the row: {heading: cell}}."""
    lines = [line.strip("| ").split(" | ") for line in text.split("\n")]
    start = next(number for number, line in enumerate(lines) if column in line)
    heading, rows = lines[start], {}
    for line in text.split("\n")[start + 2 :]:
        if not line.startswith("|"):
            break
        row = [cell.strip() for cell in line[1:-1].split(" | ")]
        rows[row[0]] = dict(zip(heading, row, strict=True))
    return rows
