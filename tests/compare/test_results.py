"""Equal FLOPs and the tables, on hand-made summaries."""

import json
from statistics import stdev

import pytest
import yaml

from remoe.compare.budget import matches
from remoe.compare.experiment import experiment_from_dict
from remoe.compare.pool import Pool
from remoe.compare.record import RoutingFigures, RunRecord, options_of
from remoe.compare.report import markdown
from remoe.compare.results import results
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


def finish(pool, run, loss, flops):
    folder = pool.folder(run)
    folder.path.mkdir(parents=True)
    folder.config.write_text(yaml.safe_dump(run.config.to_dict()))
    part = {"loss": loss, "sparsity": 0.8}
    summary = {
        "steps": run.steps, "validation_loss": loss, "validation": {"all": part, "code": {"loss": loss + 1}},
        "total_parameters": 8, "active_parameters": 4, "tokens": 10 * run.steps, "flops": flops,
        "flops_per_token": flops / (10 * run.steps), "tokens_per_second": 50.0, "peak_memory_bytes": 2**30,
        "settling_step": 7 if run.seed else None, "sparsity_deviation": 0.004 if run.seed else None, "seconds": 60.0,
    }  # fmt: skip
    folder.summary.write_text(json.dumps(summary))


@pytest.fixture
def pool(tmp_path):
    return Pool(tmp_path, "fingerprint")


@pytest.fixture
def trial():
    return experiment_from_dict(EXPERIMENT, "trial", "trial.yaml")


def test_the_cheaper_run_gets_as_many_steps_as_cost_the_same(trial, pool):
    assert all(match.run is None for match in matches(trial, pool.summary) if match.tokens_run.variant != "relu")
    for run in trial.runs:
        flops = {"relu": 1100.0, "topk": 1000.0, "near": 1092.0, "wide": 9000.0}[run.variant]
        finish(pool, run, 4.0, flops)
    found = {(match.tokens_run.variant, match.tokens_run.seed): match.run for match in matches(trial, pool.summary)}
    assert {variant for variant, _ in found} == {"relu", "topk", "near"}
    assert found["topk", 0].steps == 110
    assert found["topk", 0].config.steps == 110
    assert found["topk", 0].label.endswith("-flops")
    assert found["near", 1].steps == 100  # within 1 %
    assert found["relu", 0] == trial.runs[0]
    assert pool.state(found["topk", 0]) == "not started"


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

    one = RoutingFigures(3, 1.5, 0.1, None, 0.5, 0.25, [0.8, 0.9], None)
    other = RoutingFigures(5, 1.7, 0.3, -0.5, 0.5, 0.25, [0.6, 0.9], None)
    tops = {"relu": [[["the", "a|`b"], ["\n"]]]}
    routing = {"relu": [one, other], "topk": [one]}
    text = markdown(trial, found, routing, tops, {"A figure": "figures/a.png"}, "Data.", ["a machine"], ["mind."])
    assert "| topk | 2 | 100 | 4.4500 ± 0.0707 | +0.3500 ± 0.2121 |" in text
    assert "| near | 1 | 100 | 4.1000 | +0.1000 |" in text
    assert "| GiB | 0.8000 | not, 7 | 0.0040 |".replace("| GiB", "1.00 GiB") in text
    assert "| topk | 1 | 3 | 1.50 | 0.1000 |  | 0.500 | 0.250 |  | 0.800 0.900 |" in text
    assert "| relu | 2 | 4 ± 1 | 1.60 ± 0.14 | 0.2000 ± 0.1414 | -0.50 | 0.500 ± 0.000 |" in text
    assert "| 0 | 0 | `the` `` a\\|`b `` |\n| 0 | 1 | `\\n` |" in text
    assert "**Note:** mind." in text
    assert "**Not finished (2):**" in text
    assert "nan" not in text


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
    on_a_gpu = Pool(pool.path, "fingerprint", bfloat16=True)  # another result, therefore another run
    assert on_a_gpu.state(run) == "not started"


def test_a_record_stands_for_its_run_and_may_lack_an_option_that_came_later(trial, pool, tmp_path):
    run, records = trial.runs[0], tmp_path / "records"
    records.mkdir()
    options = options_of(run.config)
    del options["optim.clip"]
    path = records / f"{pool.name(run)}.json"
    RunRecord(options, {"validation_loss": 4.0}, {}, None).save(path)
    assert Pool(tmp_path / "other", "fingerprint", records).summary(run) == {"validation_loss": 4.0}
    assert Pool(tmp_path / "other", "fingerprint").summary(run) is None
    later = json.loads(path.read_text()) | {"unheard_of": 1}
    path.write_text(json.dumps(later))
    assert Pool(tmp_path / "other", "fingerprint", records).summary(run) == {"validation_loss": 4.0}
    for damaged in (json.dumps(later)[:60], "{}", "[]"):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match="not a whole record"):
            Pool(tmp_path / "other", "fingerprint", records).summary(run)
    RunRecord(options | {"optim.beta2": 0.5}, {}, {}, None).save(path)
    with pytest.raises(ConfigError, match=r"trained with optim.beta2 0.5, now 0.95 is asked for"):
        Pool(tmp_path / "other", "fingerprint", records).summary(run)
