"""The tables and notes of a report, on hand-made records."""

from dataclasses import replace

import pytest
from finished_run import DATA, cells, finish, record, routing

from remoe.lab.compare.budget import matches
from remoe.lab.compare.experiment import experiment_from_dict
from remoe.lab.compare.pool import Pool
from remoe.lab.compare.record import RunRecord, ZeroShot, options_of
from remoe.lab.compare.results import results
from remoe.lab.compare.tables import gallery, markdown


def notes_of(text):
    return [line for line in text.split("\n") if line.startswith("**Note:**")]


def test_the_report_has_losses_costs_machines_and_what_is_missing(trial, pool):
    losses = {"relu": [4.0, 4.2], "topk": [4.5, 4.4], "near": [4.1], "wide": [3.0]}
    for run in trial.runs:
        if run.seed < len(losses[run.variant]):
            finish(pool, run, losses[run.variant][run.seed], 1000.0)
    text = markdown(trial, results(trial, pool), {}, DATA)
    rows = cells(text, "validation loss")
    topk = {"seeds": "2", "steps": "100", "validation loss": "4.4500 ± 0.0707", "minus relu": "+0.3500 ± 0.2121"}
    assert rows["topk"].items() >= topk.items()
    assert rows["topk"]["mean over domains"] == "5.4500 ± 0.0707"
    assert (rows["near"]["validation loss"], rows["near"]["minus relu"]) == ("4.1000", "+0.1000")
    assert rows["relu"]["minus relu"] == ""
    assert cells(text, "code")["topk"]["code"] == "5.450 ± 0.071"
    assert "2030-01-01 to 2030-01-02" in text
    assert text.index("1. cpu other") < text.index("2. cpu one")
    machines = {name: row["machine"] for name, row in cells(text, "machine").items()}
    assert (machines["relu"], machines["near"]) == ("1, 2", "1")
    assert "**Not finished (2):** tiny-hash-seed1, tiny-hash-seed1 at equal FLOPs" in text
    assert "2,000 training and 9 validation tokens" in text


def test_the_page_of_figures_shows_each_with_its_title(trial):
    page = gallery(trial, {"A figure": "figures/a.png"})
    assert page.startswith("# Trial: figures\n")
    assert "![A figure](figures/a.png)" in page


def test_a_run_that_misses_its_budget_is_named_with_every_seed(trial, pool):
    for run in trial.runs:
        finish(pool, run, 4.0, {"topk": 800.0}.get(run.variant, 1000.0))
    for match in matches(trial, pool):
        if match.run.steps != 100:
            finish(pool, match.run, 4.0, 1050.0 if match.run.seed else 950.0)  # their mean is the budget
    (note,) = notes_of(markdown(trial, results(trial, pool), {}, DATA))
    assert "topk at equal FLOPs" in note
    assert "0.950, 1.050" in note


def test_means_over_layers_are_weighted_by_pairs():
    figures = routing().figures
    assert figures.over_pairs("load_imbalance") == pytest.approx((2 * 1 + 1 * 4) / 3)
    assert figures.over_pairs("expert_reuse") is None  # not kept
    closed = routing(sparsity_per_layer=[0.8, 1.0], specialisation_per_layer=[0.1, None]).figures
    assert closed.over_pairs("specialisation") == 0.1
    empty = routing(sparsity_per_layer=[1.0, 1.0], specialisation_per_layer=[None, None]).figures
    assert empty.over_pairs("specialisation") is None


def test_the_table_of_routing_and_what_it_cannot_know(trial, pool):
    finish(pool, trial.runs[0], 4.0, 1000.0)
    second = routing(inactive_experts=5, frequency_correlation=-0.5, load_imbalance_per_layer=[3, None])
    records = {
        "relu": [
            record({}, routing(), flip_rate=[0.6, None, 0.3, None, None, 0.0]),
            record({"seed": 1}, second),
        ],
        "topk": [record({"router": "topk"}, routing(sparsity_per_layer=[1.0, 1.0]), reg_loss=[0.0] * 6)],
        "dense": [record({"router": "dense"}, None)],
        "faded": [record({}, None, reg_loss=[1.0, 1.0, 1.0, 1.0, 1.0, 0.0])],
    }
    text = markdown(trial, results(trial, pool), records, DATA)
    rows = cells(text, "flip rate")
    assert [*rows] == ["relu", "topk"]
    _, seeds, inactive, imbalance, special, correlation, chunks, reuse, flips, late, layers = rows["relu"].values()
    assert (seeds, inactive, imbalance, special) == ("2", "4 ± 1", "2.50 ± 0.71", "0.2000 ± 0.0000")
    assert (correlation, chunks, reuse) == ("-0.50", "", "")
    assert (flips, late, layers) == ("0.30000", "0.00000", "0.800 0.900")
    _, seeds, inactive, *unknown, flips, late, layers = rows["topk"].values()
    assert (seeds, inactive, unknown) == ("1", "3", [""] * 5)
    assert (flips, late, layers) == ("not measured", "not measured", "1.000 1.000")
    assert "`validate: {flips_every: N}`" in text
    tokens = [line for line in text.split("\n") if line.startswith("| 0 | ")]
    assert tokens[:2] == ["| 0 | 0 | `the` `` a\\|`b `` |", "| 0 | 1 | `\\n` |"]
    (note,) = notes_of(text)
    assert all(part in note for part in ("faded, seed 0", "33%", "1e-06 nats", "second half of its sparse stage"))
    alone = markdown(trial, results(trial, pool), {"relu": records["relu"][:1]}, DATA)
    assert "flips_every" not in alone


def test_a_penalty_that_still_rises_has_no_note_and_a_run_that_stays_dense_has_one(trial, pool):
    rising = {"lambda": [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]}
    records = {
        "late": [record({}, None, sparsity=[0.5] * 4 + [0.8, 0.8], **rising)],
        "short": [record({"seed": 3}, None, sparsity=[0.5] * 6, **rising)],
        "fades": [record({}, None, sparsity=[0.5] * 2 + [0.8] * 4, **{"lambda": [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]})],
        "all": [record({"target_sparsity": 0.0}, None, sparsity=[0.5] * 6, reg_loss=[0.0] * 6)],  # k = E
    }
    records["held"] = [replace(records["short"][0], options={"seed": 3, "sparsity.rule": "none"})]
    short, fades, held = notes_of(markdown(trial, results(trial, pool), records, DATA))
    assert all(part in short for part in ("short, seed 3", "never became sparse", "0.50", "0.8", "too few steps"))
    assert all(part in fades for part in ("fades, seed 0", "50%", "1e-06 nats"))
    assert all(part in held for part in ("held, seed 3", "never became sparse", "lambda is fixed"))


def test_a_system_whose_loss_is_not_comparable_is_named(pool):
    variants = {"relu": {}, "choice": {"router": "expert_choice", "router_options": {"causal_evaluation": False}}}
    variants["own"] = {"router": "lory", "router_options": {"first_segment": "own"}}
    trial = experiment_from_dict({"base": {"steps": 100}, "variants": variants}, "trial", "trial.yaml")
    for run in trial.runs:
        finish(pool, run, 4.0, 1000.0)
    notes = [note for note in notes_of(markdown(trial, results(trial, pool), {}, DATA)) if "not comparable" in note]
    assert [note.split()[1] for note in notes] == ["choice", "own"]


def save_with_tasks(pool, run, rows, tasks):
    known = RunRecord(options_of(run.config), pool.summary(run), {"step": [100], "sparsity": [0.875]}, None)
    replace(known, zero_shot=ZeroShot(rows, tasks)).save(pool.record_file(run))


def test_zero_shot_accuracies_are_shown_with_their_rows(trial, pool):
    for run in trial.runs:
        finish(pool, run, 4.0, 1000.0)
        if run.variant == "relu" or (run.variant == "topk" and run.seed == 0):
            save_with_tasks(pool, run, 500, {"piqa": {"acc": 0.25 + run.seed / 4, "chance": 0.5}})
    rows = cells(markdown(trial, results(trial, Pool(pool.path, "fingerprint")), {}, DATA), "piqa")
    assert [*rows] == ["relu", "topk", "guessing"]
    assert [*rows["relu"].values()] == ["relu", "2", "500", "0.375 ± 0.177", "0.375 ± 0.177"]
    assert [*rows["topk"].values()] == ["topk", "1", "500", "0.250", "0.250"]


@pytest.mark.parametrize(
    ("tasks", "mean", "relu", "topk", "guessing"),
    [
        (
            ("piqa", "arc"),
            "mean",
            ["0.400", "0.600", "0.500"],
            ["0.500", "0.500", "0.500"],
            ["0.500", "0.250", "0.375"],
        ),
        (("piqa",), "mean of piqa", ["0.400", "0.600", "0.400"], ["0.500", "", "0.500"], ["0.500", "0.250", "0.500"]),
        (
            ("boolq",),
            "mean of none",
            ["0.400", "0.600", "", ""],
            ["", "", "0.500", ""],
            ["0.500", "0.250", "0.500", ""],
        ),
    ],
)
def test_the_mean_accuracy_is_over_the_tasks_that_all_have(tasks, mean, relu, topk, guessing, trial, pool):
    accuracy = {"relu": {"piqa": 0.4, "arc": 0.6}, "topk": dict.fromkeys(tasks, 0.5)}
    for run in trial.runs[:2]:
        finish(pool, run, 4.0, 1000.0)
        given = accuracy[run.variant].items()
        save_with_tasks(
            pool, run, None, {task: {"acc": a, "chance": 0.25 if task == "arc" else 0.5} for task, a in given}
        )
    rows = cells(markdown(trial, results(trial, Pool(pool.path, "fingerprint")), {}, DATA), mean)
    assert [*rows["relu"].values()] == ["relu", "1", "all", *relu]
    assert [*rows["topk"].values()] == ["topk", "1", "all", *topk]
    assert [*rows["guessing"].values()] == ["guessing", "", "", *guessing]
