"""A mistake in a command is one line and exit code 2, found before any work."""

import os

import pytest

from remoe.lab.cli.main import COMMANDS, main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--batch-size", "4", "--micro-batch-size", "16"], "16 does not divide --batch-size 4"),
        (["train", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["train", "--k", "9"], "k = 9 and E = 8"),
        (["train", "--router", "soft"], "unknown router 'soft'"),
        (["train", "--preset", "huge"], "unknown preset 'huge'"),
        (["train", "--model.num-attention-heads", "3"], "heads must divide the width"),
        (["train", "--granularity", "7"], "granularity must divide"),
        (["train", "--steps", "0"], "--steps must be at least 1"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--colour", "red"], "--colour"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--seed", "18446744073709551616"], "--seed"),
        (["train", "--optim.lr", "nan"], "--optim.lr"),
        (["train", "--optim.beta1", "1.5"], "--optim.beta1"),
        (["train", "--optim.clip", "0"], "--optim.clip"),
        (["train", "--optim.warmup-ratio", "-3"], "--optim.warmup-ratio"),
        (["train", "--sparsity.lambda-init", "inf"], "--sparsity.lambda-init"),
        (["train", "--model.initializer-range", "-1"], "--model.initializer-range"),
        (["train", "--model.router-std", "0"], "--model.router-std"),
        (["train", "--router-options", "max_experts_per_token", "1", "--k", "2"], "at least k = 2"),
        (["train", "--device", "meta"], "unknown device 'meta'; choose auto, cpu, cuda, cuda:N or mps"),
        (["train", "--device", "cuda:999"], "--device cuda:999"),
        (["train", "--prompt", "x\udcff"], "not valid UTF-8"),
        (["train", "--micro-batch-size", "3"], "does not divide"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--seq-len", "100000"], "too few for one window of 100000"),
        (["train", "--out", "nowhere", "--resume"], "nowhere is not a run"),
        (["generate", "nowhere"], "nowhere does not exist"),
        (["generate", "nowhere", "--top-p", "2"], "top-p"),
        (["generate", "nowhere", "--gate-threshold", "nan"], "--gate-threshold must be at least 0"),
        (["generate", "nowhere", "--max-experts", "0"], "--max-experts must be at least 1"),
        (["generate", "nowhere", "--temperature", "nan"], "temperature"),
        (["generate", "nowhere", "--seed", "99999999999999999999999"], "--seed"),
        (["generate", "nowhere", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["generate", "nowhere", "--prompt", "a", "--file", "b"], "--prompt and --file do not go together"),
        (["generate", "nowhere", "--system", "a"], "--system needs --chat"),
        (["generate", "nowhere", "--prompt", "a", "--format", "whole"], "--format is for --file and standard input"),
        (["generate", "nowhere", "--interactive", "--out", "a"], "--interactive does not go with"),
        (["generate", "nowhere", "--file", "missing"], "missing: cannot be read: No such file"),
        (["generate", "nowhere", "--prompt", "a", "--out", "b/c"], "--out b/c: b is not a folder"),
        (["plan", "tiny", "--seq-len", "0"], "at least 1"),
        (["train", "--model.intermediate-size", "99999999999999999999"], "more numbers than any machine can hold"),
        (["generate", "nowhere", "--repetition-penalty", "1e-320"], "--repetition-penalty at least 0.001"),
        (["eval", "nowhere"], "nowhere does not exist"),
        (["eval", "nowhere", "--split", "test"], "unknown --split 'test'"),
        (["plan", "huge"], "unknown preset 'huge'"),
        (["plan", "tiny", "--k", "9"], "k = 9 and E = 8"),
        (["trian"], "unknown command 'trian'; perhaps you meant 'train'"),
        (["bench", "lyer"], "unknown command 'bench lyer'; perhaps you meant 'bench layer'"),
        (["train", "--stepz", "3"], "unknown option --stepz; perhaps you meant --steps (see"),
        (["train", "--lr", "1"], "unknown option --lr; perhaps you meant --optim.lr (see"),
        (["train", "--every", "1"], "perhaps you meant --validate.every or --checkpoint.every (see"),
        (["train", "--zzz=1", "--quux"], "unknown options --zzz, --quux (see"),
        (["train", "stray"], "unexpected 'stray'"),
        (["generate", "--steps", "1e3", "x"], "unknown option --steps (see"),
        (["generate", "--colour", "x"], "unknown option --colour (see"),
        (["train", "--steps", "1e3"], "--steps must be a whole number, but is '1e3'"),
        (["train", "--optim.lr", "fast"], "--optim.lr must be a number, but is 'fast'"),
        (["train", "--sparsity.alpha", "1"], "--sparsity.alpha must be finite and above 1, but is 1.0"),
        (["train", "--optim.lr", "nan"], "--optim.lr must be finite and above 0, but is nan"),
        (
            ["train", "--router-options", "max_experts_per_token", "2", "--router", "topk"],
            "router 'topk' has no option 'max_experts_per_token'",
        ),
        (["export"], "RUN and DIR missing"),
        (["compare"], "error: EXPERIMENT missing"),
        (["data", "check"], "error: DIR missing"),
        (["train", "--seed"], "error: --seed needs a value"),
        (["data", "prepare", "x"], "error: --out missing"),
        (["data", "prepare", "--out", "d", "--vocab-size", "3"], "error: --vocab-size must be"),
        (["bench", "layer", "--threads", "0"], "--threads must be from 1 to 4096, but is 0"),
        (["bench", "layer", "--backends", "foo"], "unknown experts backend 'foo'"),
        (["bench", "decode", "--repetitions", "0"], "--repetitions must be at least 1, but is 0"),
        (["eval", "nowhere", "--json", "nodir/x.json"], "nodir is not a folder"),
        (["eval", "nowhere", "--json", "."], "--json . is a folder"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["report", "nowhere", "--out", "nodir/x.html"], "nodir is not a folder"),
        (["report", "nowhere", "--excerpt", "0"], "must be at least 1"),
        (
            ["train", "--router", "topk", "--router-options", "warmup_k", "2.5", "warmup_steps", "3"],
            "router 'topk': option warmup_k must be a whole number, but is 2.5",
        ),
        (
            ["train", "--router-options", "d_model", "3"],
            "has no option 'd_model'; it has: load_balance, ",
        ),
        (["train", "--router-options", "load_balance", "maybe"], "must be true or false, but is 'maybe'"),
        (["train", "--router-options", "gate_scale", "a"], "option gate_scale must be a number, but is 'a'"),
        (["train", "--router", "dense", "--router-options", "a", "1"], "router 'dense' has no option 'a'; it has none"),
        (["train", "--router", "relu_norm", "--router-options", "chunk", "0"], "chunk >= 1"),
        (["train", "--router-options", "load_balance_power", "inf"], "load_balance_power must be finite"),
        (["train", "--router", "lory", "--router-options", "segment", "0"], "segment must be at least 1"),
        (
            ["train", "--router", "topk", "--router-options", "warmup_k", "9", "warmup_steps", "3"],
            "warmup_k must be between k = 1 and E = 8",
        ),
        (["train", "--router", "relu_scaled", "--router-options", "scale_init", "0"], "scale_init must be above zero"),
        (["train", "--router", "threshold", "--router-options", "decay", "1"], "below 1, but is 1"),
        (["train", "--router", "sigmoid", "--router-options", "bias_step", "-1"], "must not be negative"),
        (["train", "--router", "sparsemixer", "--router-options", "jitter", "2"], "jitter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train" and "--data" not in arguments:
        arguments = [*arguments, "--data", str(corpus)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("arguments", [["bench"], ["data", "--help"]])
def test_a_group_lists_its_own_commands(arguments, capsys):
    assert main(arguments) == (0 if "--help" in arguments else 2)
    out = capsys.readouterr().out
    assert all((f"  {name} " in out) == name.startswith(arguments[0]) for name in COMMANDS)


@pytest.mark.parametrize(
    "flags",
    [
        ["--router", "reluu"],
        ["--router-options", "a", "1"],
        ["--device", "abacus"],
        ["--device", "cpu", "--model.backend", "triton"],
    ],
)
def test_what_cannot_be_trained_is_found_before_any_data_is_prepared(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("remoe.lab.training.data.default_dataset", lambda *_: pytest.fail("prepares data"))
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert any(words in error for words in ("error: unknown", "has no option 'a'", "'triton' cannot run here"))


def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "options.yaml")
    for command in (["compare"], ["train", "--config"]):
        assert main([*command, str(tmp_path / "options.yaml")]) == 2
        assert "options.yaml: it is a pipe" in capsys.readouterr().err


def test_a_message_does_not_repeat_a_whole_text(capsys):
    assert main(["plan", "x" * 5000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 1100
    assert line.startswith("remoe: error: unknown preset 'xxx")
    assert line.endswith("choose one of: tiny, mini, 182m, 469m, 978m")
