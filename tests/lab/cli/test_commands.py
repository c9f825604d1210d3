"""Commands on a trained run, and one clear line with exit code 2 for each mistake."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from tiny_run import FLAGS

import remoe
from remoe.lab.cli.main import COMMANDS, main
from remoe.lab.data import PrepareOptions, prepare
from remoe.lab.training.folder import RunFolder
from remoe.routing import ROUTERS
from remoe.sparsity import RULES


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(corpus), "--out", str(out), "--steps", "30", *FLAGS]) == 0
    return out


def test_generate_repeats_itself_by_seed(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--prompt", "cow ", "--max-new-tokens", "20", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("cow ")


def test_generate_options_and_empty_prompt(run, capsys):
    assert main(["generate", str(run), "--temperature", "0", "--max-new-tokens", "5"]) == 0
    greedy = capsys.readouterr().out
    assert main(["generate", str(run), "--top-k", "1", "--max-new-tokens", "5", "--seed", "7"]) == 0
    assert capsys.readouterr().out == greedy


def test_a_prompt_and_a_text_have_bounds(run, capsys, caplog, monkeypatch):
    begin = time.process_time()
    assert main(["generate", str(run), "--prompt", 250_000 * "cow "]) == 2
    assert re.fullmatch(
        r"remoe: error: the prompt has \d+,\d{3} tokens; this model takes at most 16,384\n", capsys.readouterr().err
    )
    assert time.process_time() - begin < 5
    assert main(["generate", str(run), "--max-new-tokens", "1000000000000"]) == 2
    assert "--max-new-tokens must be from 1 to 1,000,000, but is 1000000000000" in capsys.readouterr().err
    monkeypatch.setattr("remoe.lab.generation.text.MANY_TOKENS", 4)
    assert main(["generate", str(run), "--max-new-tokens", "5"]) == 0
    assert caplog.messages == ["writing up to 5 tokens, which takes a while"]


def test_eval_agrees_with_the_run_and_with_itself(run, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert main(["eval", str(run), "--json", str(figures)]) == 0
    assert "farm" in capsys.readouterr().out
    rows = json.loads(figures.read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert rows["all"]["loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert rows["all"]["perplexity"] == pytest.approx(math.exp(rows["all"]["loss"]))
    assert rows["all"]["tokens"] == rows["farm"]["tokens"] + rows["town"]["tokens"]
    assert 0 < rows["all"]["sparsity"] < 1


def test_eval_of_a_part_shares_it_out_over_the_domains(run, tmp_path):
    rows = []
    for flags in ([], ["--max-tokens", "300"]):
        assert main(["eval", str(run), "--json", str(tmp_path / "figures.json"), *flags]) == 0
        rows.append(json.loads((tmp_path / "figures.json").read_text()))
    for domain in ("farm", "town"):
        assert 0 < rows[1][domain]["tokens"] < rows[0][domain]["tokens"]


def test_sweep_of_thresholds_trades_experts_for_loss(run, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert main(["eval", str(run), "--sweep-threshold", "auto", "--json", str(figures)]) == 0
    assert "active experts" in capsys.readouterr().out
    points = json.loads(figures.read_text())["points"]
    assert main(["eval", str(run), "--json", str(figures)]) == 0
    everything = json.loads(figures.read_text())["all"]
    assert points[0]["threshold"] == 0
    assert points[0]["loss"] == pytest.approx(everything["loss"], rel=1e-6)
    assert points[0]["active_experts"] == pytest.approx(4 * (1 - everything["sparsity"]), rel=1e-6)
    active = [point["active_experts"] for point in points]
    assert active == sorted(active, reverse=True)
    assert 0 < active[-1] < active[0] / 4  # about a tenth: many pairs of this repetitive text have the same gate
    assert main(["eval", str(run), "--sweep-threshold", "1e9", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["points"][0]["active_experts"] == 0
    assert main(["eval", str(run), "--max-experts", "1", "--json", str(figures)]) == 0
    assert 4 * (1 - json.loads(figures.read_text())["all"]["sparsity"]) <= 1


def test_a_sweep_of_a_model_that_is_closed_has_nothing_to_leave_out(run, tmp_path, capsys):
    closed = tmp_path / "run"
    shutil.copytree(run, closed)
    checkpoint = RunFolder(closed).last_checkpoint()
    model = remoe.RemoeForCausalLM.from_pretrained(checkpoint)
    for layer in model.model.layers:
        layer.mlp.router.weight.data.zero_()
    model.save_pretrained(checkpoint)
    (checkpoint / "checksums.json").unlink()  # those of the model before
    assert main(["eval", str(closed), "--sweep-threshold", "auto"]) == 2
    assert "no expert is active for any token" in capsys.readouterr().err


def test_eval_of_quantised_weights(run, tmp_path, capsys):
    pytest.importorskip("torchao")
    figures = []
    for flags in ([], ["--quantize", "int8"]):
        assert main(["eval", str(run), "--json", str(tmp_path / "figures.json"), *flags]) == 0
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    before, after = figures[0]["all"], figures[1]["all"]
    assert before["loss"] != after["loss"] == pytest.approx(before["loss"], abs=0.02)
    assert figures[1]["before_quantisation"] == before
    assert f"loss {before['loss']:.4f} before int8, {after['loss']:.4f} after" in capsys.readouterr().out


def test_without_torchao_the_command_names_the_extra(run, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert main(["eval", str(run), "--quantize", "int8"]) == 2
    expected = "remoe: error: quantisation needs torchao: pip install 'remoe[quantize]'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "flags", [["--sweep-threshold", "a,b"], ["--sweep-threshold", "-1"], ["--max-experts", "0"], ["--quantize", "int3"]]
)
def test_a_bad_sweep_is_one_line(run, flags, capsys):
    assert main(["eval", str(run), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_eval_and_generate_take_a_single_checkpoint(run, capsys):
    checkpoint = next((run / "checkpoints").iterdir())
    assert main(["eval", str(checkpoint), "--max-tokens", "100"]) == 0
    assert main(["generate", str(checkpoint), "--max-new-tokens", "3"]) == 0


def test_plan_prints_the_papers_figures(capsys):
    assert main(["plan", "182m"]) == 0
    output = capsys.readouterr().out
    assert "777.1M" in output
    assert "995.4" in output
    assert output.count("while half of the experts are active") == 2
    assert main(["plan", "tiny", "--router", "topk"]) == 0
    assert "while half" not in capsys.readouterr().out
    assert main(["plan", "mini", "--intermediate-size", "512", "--shared-expert-size", "256"]) == 0
    recipe = capsys.readouterr().out.split("active per token")[1].split()[1:4:2]
    assert main(["plan", "mini"]) == 0
    assert capsys.readouterr().out.split("active per token")[1].split()[1:4:2] == recipe  # a third of 768 is shared


def test_yaml_and_flags(corpus, tmp_path, capsys):
    path = tmp_path / "small.yaml"
    text = f"data: {corpus}\nsteps: 7\nnum_experts: 4\nmodel:\n  hidden_size: 32\n  num_hidden_layers: 1\n"
    path.write_text(text + "batch_size: 3\n")
    flags = ["--seq-len", "32", "--batch-size", "2", "--steps", "3"]
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run"), *flags]) == 0
    assert "finished: 3 steps" in capsys.readouterr().out
    assert RunFolder(tmp_path / "run").load_config().micro_batch_size == 2
    path.write_text(text + "micro_batch_size: 16\n")
    assert main(["train", "--config", str(path), *flags]) == 2
    assert "--micro-batch-size 16 does not divide --batch-size 2" in capsys.readouterr().err
    for text, words in (
        (b"stepz: 7", "unknown option 'stepz'"),
        (b"1: 2", "unknown option '1'"),
        (b"preset: [a]", "unknown preset"),
        (b"steps: many", "steps"),
        (b"\xff\xfe\x00", "cannot read configuration"),
        (b"a: [", "cannot read configuration"),
        (b"7", "not a mapping"),
    ):
        path.write_bytes(text)
        assert main(["train", "--config", str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("train", "[OPTIONS]"),
        ("export", "[OPTIONS] RUN DIR"),
        ("eval", "RUN"),
        ("generate", "RUN"),
        ("plan", "PRESET"),
        ("compare", "EXPERIMENT"),
        ("data check", "DIR"),
        ("data prepare", "[SOURCE ...]"),
    ],
)
def test_help_names_positional_arguments_and_every_router(command, name, capsys):
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([*command.split(), flag])
        out = capsys.readouterr().out
        assert out.splitlines()[0].endswith(f"] {name}")
    if command == "train":
        known = re.search(r"relu, relu_norm.*?dense_wide", out, re.DOTALL)[0]
        assert re.findall(r"[a-z]\w+", known.replace(" or ", " ")) == list(ROUTERS)
        assert all(f"'{rule}'" in out for rule in RULES)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_two_screens_and_tells_the_truth(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            main([*name.split(), flag])
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
    brief, everything = texts
    assert len(brief.splitlines()) <= 50
    known = set(re.findall(r"--[a-z][\w.-]*", everything)) | {"--help-all"}
    assert set(re.findall(r"--[a-z][\w.-]*", brief)) <= known
    if brief == everything:
        return
    assert all(len(line) <= 80 for line in brief.splitlines())
    assert f"remoe {name} --help-all" in brief
    flat = " ".join(re.sub("[│╭╰─╮╯]", " ", everything).split())
    entries = [" ".join(entry.split("\n\n")[0].split()) for entry in re.split(r"\n  (?=--)", brief)[1:]]
    defaults = {entry.split()[0]: found[1] for entry in entries if (found := re.search(r"\(default (.*?)\)", entry))}
    assert len(defaults) >= 2
    for flag, default in defaults.items():
        assert default == re.search(rf" {flag} [A-Z{{].*?\(default: (.*?)\)", flat)[1], flag


@pytest.mark.parametrize("damage", ["no tokenizer", "empty tokenizer", "no config", "other config", "garbage config"])
def test_a_damaged_run_is_one_line(run, tmp_path, capsys, damage):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = next((copy / "checkpoints").iterdir()) / "config.json"
    if damage == "no tokenizer":
        shutil.rmtree(copy / "tokenizer")
    elif damage == "empty tokenizer":
        (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    elif damage == "no config":
        config.unlink()
    else:
        other = {"vocab_size": 7, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config.write_text(json.dumps(other) if damage == "other config" else "garbage")
    assert main(["generate", str(copy), "--max-new-tokens", "3"]) == 2
    error = capsys.readouterr().err
    assert str(copy) in error
    assert len(error.strip().splitlines()) == 1


def test_data_of_another_tokenizer_is_refused(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    (run / "summary.json").unlink()
    (tmp_path / "other.txt").write_text("\n".join(f"quite another text {i}" for i in range(400)))
    (tmp_path / "held.txt").write_text("held out")
    sources = {"sources": (str(tmp_path / "other.txt"),), "validation": (str(tmp_path / "held.txt"),)}
    data = prepare(PrepareOptions(**sources, out=tmp_path / "data", vocab_size=280, quiet=True))
    assert main(["eval", str(run), "--data", str(data)]) == 2
    assert "prepared with a tokenizer different from" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(run), "--data", str(data)]) == 2
    assert "prepared with a tokenizer different from" in capsys.readouterr().err


def test_threads_do_not_wait_for_each_other_at_full_speed(monkeypatch, tmp_path):
    """Or a training step becomes ten times slower where something else runs too. The test below: torch comes later."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


SLOW_MODULE = """
import os, signal, time

def work(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

if os.environ["WHEN"] == "import":
    try:
        work(None)
    except KeyboardInterrupt:
        raise ImportError("SciPy turns it into this")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("when", ["import", "work"])
def test_an_interrupt_is_one_word_and_exit_code_130_at_any_time(tmp_path, when):
    (tmp_path / "slow.py").write_text(SLOW_MODULE)
    # A job in the background ignores SIGINT.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from remoe.lab.cli import main; main.COMMANDS['slow'] = ('slow', 'work', ''); "
    code += f"sys.path.insert(0, {str(tmp_path)!r}); sys.exit(main.main(['slow']))"
    environment = {**os.environ, "WHEN": when}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=50)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert done.stdout == ("" if when == "import" else "cleaned up\n")


def test_every_command_has_help_that_starts_without_torch_and_so_does_a_plan():
    code = (
        "import sys; from remoe.lab.cli.main import COMMANDS, main\n"
        "assert main(['plan', '182m', '--router', 'lory']) == 0\n"
        "for words in ('plan tiny', 'train'): assert main([*words.split(), '--router', 'rleu']) == 2\n"
        "for name in COMMANDS:\n"
        "    print('===')\n"
        "    try: main([*name.split(), '--help'])\n"
        "    except SystemExit as stop: assert not stop.code, name\n"
        "    assert 'torch' not in sys.modules, f'the help of {name} imports torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unknown router 'rleu'; choose one of: relu, ") == 2
    _, *helps = done.stdout.split("===\n")
    assert len(helps) == len(COMMANDS)
    assert all("usage" in text.lower() for text in helps)
