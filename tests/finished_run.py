"""Runs of a comparison that look finished, by hand: no training."""

import json

import yaml

from remoe.lab.compare.record import RunRecord, options_of

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
