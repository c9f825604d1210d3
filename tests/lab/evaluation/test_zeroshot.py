"""Zero-shot accuracy through the harness equals what a few lines of brute force find; mistakes are one line."""

import json
import math
import random
import statistics
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import FLAGS
from transformers import LlamaConfig, LlamaForCausalLM

from remoe import RemoeConfig, RemoeForCausalLM
from remoe.lab.cli.main import main
from remoe.lab.data import load_tokenizer

pytest.importorskip("lm_eval")

from remoe.lab.evaluation.zeroshot import TASKS, WindowedModel, _harness_tasks, evaluate_task, is_causal, load_tasks

WINDOW = 32
WORDS = ["cow", "sheep", "hen", "goat", "barn", "road", "shop", "bus", "tram", "lamp", "0.", "3.", "6.", "é"]


def write(folder, name, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def text(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load_tokenizer(corpus / "tokenizer")


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random, and only ever predicts tokens that begin a word: LAMBADA can be hit."""
    torch.manual_seed(0)
    config = RemoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=1, max_position_embeddings=WINDOW,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    model = RemoeForCausalLM(config).eval()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    with torch.no_grad():
        model.lm_head.weight[[not (token.startswith("Ġ") and token[1:].isalpha()) for token in tokens]] = 0
    return model


def score(model, tokenizer, context, continuation):
    """Summed log-probabilities, whether greedy, and whether too long for the window: token after token."""
    ids = tokenizer(context + continuation)["input_ids"]
    first = len(tokenizer(context)["input_ids"])
    piece = len(ids) - first if len(ids) - first <= WINDOW else WINDOW // 2
    total, greedy = 0.0, True
    for at in range(first, len(ids)):
        end = min(first + ((at - first) // piece + 1) * piece, len(ids))  # of the piece scored in one window
        with torch.no_grad():
            logits = model(torch.tensor([ids[max(0, end - 1 - WINDOW) : at]])).logits[0, -1]
        total += logits.log_softmax(-1)[ids[at]].item()
        greedy &= logits.argmax().item() == ids[at]
    return total, greedy, len(ids) > WINDOW + 1


@pytest.fixture(scope="module")
def data(tmp_path_factory, model, tokenizer):
    """Contexts shorter and longer than the window, answers of one token and longer than the window."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    rows = []
    for i in range(24):
        choices = [text(rng, rng.choice([1, 2, 5])) for _ in range(rng.choice([2, 3, 4]))]
        if i % 8 == 0:
            choices[-1] = " " + text(rng, 2 * WINDOW)
        context = text(rng, rng.choice([1, 6, 3 * WINDOW])) + ("\nAnswer:" if i % 2 else "")
        rows.append({"context": context, "choices": choices, "gold": rng.randrange(len(choices))})
    write(folder, "piqa", rows)
    write(folder, "boolq", [row | {"choices": ["a", "c"], "gold": row["gold"] % 2} for row in rows])

    words = []
    for i in range(24):
        context = text(rng, rng.choice([3, 3 * WINDOW]))
        with torch.no_grad():
            ids = torch.tensor([tokenizer(context)["input_ids"][-WINDOW:]])
            best = tokenizer.decode(model(ids).logits[0, -1].argmax())
        words.append({"context": context, "choices": [best[1:] if i % 3 else rng.choice(WORDS)], "gold": 0})
    write(folder, "lambada", words)
    return folder


def harness(model, tokenizer, batch_size):
    return WindowedModel(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", ["piqa", "boolq", "lambada"])
def test_accuracy_is_that_of_brute_force(name, batch_size, model, tokenizer, data):
    task = load_tasks([name], data)[name]
    result = evaluate_task(harness(model, tokenizer, batch_size), name, task)

    requests = {(request.doc_id, request.idx): request for request in task.instances}
    hits, normalized, chances, cut = [], [], [], 0
    for number, row in enumerate(pq.read_table(data / f"{name}.parquet").to_pylist()):
        scores = [score(model, tokenizer, row["context"], " " + choice) for choice in row["choices"]]
        for i, (total, greedy, _) in enumerate(scores):
            found, found_greedy = requests[number, i].resps[0]
            assert found == pytest.approx(total, rel=1e-4)  # float32 sums over other batch shapes
            assert found_greedy == greedy
        by_length = [total / len(choice) for (total, _, _), choice in zip(scores, row["choices"], strict=True)]
        best = max(range(len(scores)), key=lambda i: scores[i][0])
        hits.append(scores[0][1] if name == "lambada" else best == row["gold"])
        normalized.append(by_length.index(max(by_length)) == row["gold"])
        chances.append(0 if name == "lambada" else 1 / len(scores))
        cut += any(long for _, _, long in scores)
    assert 0 < sum(hits) < len(hits)
    assert 0 < cut < len(hits)
    assert result.acc == pytest.approx(statistics.mean(hits))
    assert result.stderr == pytest.approx(statistics.stdev(hits) / math.sqrt(len(hits)))
    assert result.acc_norm == (pytest.approx(statistics.mean(normalized)) if name == "piqa" else None)
    assert result.chance == pytest.approx(statistics.mean(chances))
    assert (result.examples, result.truncated) == (len(hits), cut)


def test_an_empty_context_is_scored_after_the_end_of_text_token(model, tokenizer):
    assert harness(model, tokenizer, 1).prefix_token_id == tokenizer.eos_token_id


def test_a_limit_takes_rows_evenly_spaced(model, tokenizer, data):
    task = load_tasks(["piqa"], data)["piqa"]
    result = evaluate_task(harness(model, tokenizer, 4), "piqa", task, limit=5)
    rows = pq.read_table(data / "piqa.parquet").to_pylist()
    assert result.examples == 5
    assert [request.doc for request in task.instances if request.idx == 0] == [rows[i] for i in (0, 4, 9, 14, 19)]
    assert evaluate_task(harness(model, tokenizer, 4), "piqa", task, limit=1).stderr is None
    assert evaluate_task(harness(model, tokenizer, 4), "piqa", task, limit=99).examples == 24


def test_contexts_are_taken_literally(model, tokenizer, tmp_path):
    """Digits and template signs mean something to the harness."""
    contexts = ["12", "{{ 7 }} {% if %}", "[1, 2]\n"]
    write(tmp_path, "piqa", [{"context": context, "choices": ["34", "[5]"], "gold": 0} for context in contexts])
    task = load_tasks(["piqa"], tmp_path)["piqa"]
    evaluate_task(harness(model, tokenizer, 4), "piqa", task)
    asked = [request.args for request in task.instances]
    assert asked == [(context, answer) for context in contexts for answer in (" 34", " [5]")]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(corpus), "--out", str(out), "--steps", "2", *FLAGS]) == 0
    return out


@pytest.mark.parametrize("kind", ["run", "checkpoint", "ours", "llama"])
def test_the_command_takes_runs_and_transformers_folders(kind, run, model, tokenizer, data, tmp_path, capsys):
    folder = run if kind == "run" else next((run / "checkpoints").iterdir())
    if kind in ("ours", "llama"):
        folder = tmp_path / kind
        if kind == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=WINDOW, **sizes))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    figures = tmp_path / "figures.json"
    flags = ["--tasks", "piqa, lambada", "--task-data", str(data), "--limit", "6", "--json", str(figures)]
    assert main(["eval", str(folder), *flags]) == 0
    table = capsys.readouterr().out
    rows = json.loads(figures.read_text())
    assert list(rows["tasks"]) == ["piqa", "lambada"]
    assert rows["window"] == WINDOW
    assert rows["mean_acc"] == pytest.approx(sum(row["acc"] for row in rows["tasks"].values()) / 2)
    for name, row in rows["tasks"].items():
        assert row["examples"] == 6
        assert name in table
        assert f"{row['acc']:.4f}" in table


def test_a_router_that_looks_ahead_gets_one_sequence_at_a_time(run, data, tmp_path, capsys, monkeypatch):
    from remoe.routing import ReLURouter

    monkeypatch.setattr(ReLURouter, "causal", False)
    figures = tmp_path / "figures.json"
    flags = ["--tasks", "piqa", "--task-data", str(data), "--limit", "2", "--json", str(figures)]
    assert main(["eval", str(run), *flags]) == 0
    assert "not comparable" in capsys.readouterr().out
    rows = json.loads(figures.read_text())
    assert (rows["causal"], rows["batch_size"]) == (False, 1)


def test_relu_routing_is_causal(model):
    assert is_causal(model)


def test_the_harness_is_asked_for_its_own_tasks_alone():
    """It has thousands, and reads a file for each."""
    manager = _harness_tasks(TASKS.values())
    assert {*TASKS.values()} <= {*manager.all_tasks}
    assert len(manager.all_tasks) < 100
    assert "piqa" in _harness_tasks(["piqa"]).all_tasks
    assert "race" not in _harness_tasks(["piqa"]).all_tasks


ROW = {"context": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, "piqa.parquet does not exist"),
        (b"garbage", "piqa.parquet: cannot be read"),
        ([{"context": "a", "choices": ["b", "c"]}], "piqa.parquet: has no column 'gold'"),
        ([ROW, ROW | {"gold": 2}], "row 1: gold must be the index of a choice, not 2"),
        ([ROW | {"choices": ["b"]}], "row 0: has 1 choices instead of two or more"),
        ([ROW | {"choices": ["b", ""]}], "row 0: choices must be a list of texts"),
        ([ROW | {"context": 7}], "row 0: context must be a text"),
        ([ROW | {"context": " "}], "row 0: context must be a text"),
    ],
    ids=lambda value: value.split(":")[-1].strip() if isinstance(value, str) else "",
)
def test_a_wrong_file_is_one_line(rows, words, run, tmp_path, capsys):
    if isinstance(rows, bytes):
        (tmp_path / "piqa.parquet").write_bytes(rows)
    elif rows is not None:
        write(tmp_path, "piqa", rows)
    one_line(["eval", str(run), "--tasks", "piqa", "--task-data", str(tmp_path)], words, capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "piqa,arc"], f"unknown task 'arc'; choose from: {', '.join(TASKS)}"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "piqa", "--limit", "0"], "--limit must be at least 1"),
        (["--tasks", "piqa", "--data", "x"], "do not go with --tasks"),
        (["--tasks", "piqa", "--json", "nowhere/x.json"], "nowhere is not a folder"),
        (["--task-data", "x"], "need --tasks"),
        (["--limit", "3"], "need --tasks"),
        pytest.param(
            ["--tasks", "piqa"], "task piqa cannot be loaded from the Hugging Face hub", marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(flags, words, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(["eval", str(run), *flags], words, capsys)


@pytest.mark.parametrize("damage", ["nowhere", "empty", "no weights", "no tokenizer"])
def test_a_folder_without_a_model_is_one_line(damage, model, tokenizer, data, tmp_path, capsys):
    folder = tmp_path / damage
    if damage != "nowhere":
        folder.mkdir()
    if damage == "no weights":
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if damage == "no tokenizer":
        model.save_pretrained(folder)
    one_line(["eval", str(folder), "--tasks", "piqa", "--task-data", str(data)], str(folder), capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_runs", "no_figures")
def test_a_comparison_evaluates_every_run_once(corpus, data, tmp_path, capfd):
    """Table 2 of the paper with one command; what is finished is asked for no task twice."""
    experiment = {
        "title": "Trial",
        "base": {"steps": 4, "seq_len": 32, "batch_size": 4, "micro_batch_size": 2, "num_experts": 4}
        | {"model": {"hidden_size": 32, "num_hidden_layers": 2}},
        "seeds": [0, 1],
        "equal_flops": False,
        "variants": {"topk": {"router": "topk"}},
    }
    (tmp_path / "trial.yaml").write_text(json.dumps(experiment))  # JSON is YAML
    places = ["--data", str(corpus), "--pool", str(tmp_path / "pool"), "--out", str(tmp_path / "out")]
    compare = ["compare", str(tmp_path / "trial.yaml"), *places, "--device", "cpu"]
    tasks = ["--tasks", "piqa,boolq", "--task-data", str(data), "--limit"]

    def accuracies():
        (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["equal_tokens"]
        return row["zero_shot"], row["chance"]

    assert main(compare) == 0
    assert accuracies() == ({}, {})
    assert main([*compare, *tasks, "6"]) == 0  # the runs are finished, their records lack the tasks
    found, chance = accuracies()
    for seed in (0, 1):
        run = next((tmp_path / "pool").glob(f"*seed{seed}-*/summary.json")).parent
        assert main(["eval", str(run), *tasks, "6", "--json", str(tmp_path / "one.json")]) == 0
        alone = json.loads((tmp_path / "one.json").read_text())
        for task, result in alone["tasks"].items():
            assert found[task]["values"][seed] == result["acc"]
            assert chance[task] == result["chance"]
    report = (tmp_path / "out" / "results.md").read_text()
    assert "### Equal tokens: zero-shot accuracy" in report
    assert f"| guessing |  |  | {chance['piqa']:.3f} | {chance['boolq']:.3f} |" in report
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").glob("*.json")}
    assert len(records) == 2
    assert main([*compare, *tasks, "6"]) == 0
    assert main(compare) == 0  # without tasks they stay in the record and in the table
    assert accuracies() == (found, chance)
    assert records == {path: path.stat().st_mtime_ns for path in records}
    assert main([*compare, *tasks, "3"]) == 0  # they have more rows already
    assert records == {path: path.stat().st_mtime_ns for path in records}
    assert main([*compare, *tasks, "7"]) == 0
    assert all(path.stat().st_mtime_ns > before for path, before in records.items())
    capfd.readouterr()
    for flags, words in ((["--limit", "3"], "need --tasks"), (["--tasks", "pica"], "unknown task 'pica'")):
        one_line([*compare, *flags], words, capfd)


def test_without_the_harness_the_command_names_the_extra(run, capsys, monkeypatch):
    for name in [
        name for name in sys.modules if name == "remoe.lab.evaluation.zeroshot" or name.split(".")[0] == "lm_eval"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    one_line(["eval", str(run), "--tasks", "piqa"], "--tasks needs lm_eval: pip install 'remoe[eval]'", capsys)


def one_line(arguments, words, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
