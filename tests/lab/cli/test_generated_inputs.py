"""Command lines made at random, with a fixed seed: each ends in a result or in one line, and overwrites nothing."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal

import pytest
import torch
from tiny_run import FLAGS
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from remoe.errors import ConfigError
from remoe.lab.bench import roofline, train_step
from remoe.lab.cli.main import COMMANDS, LONGEST_ERROR, main

SEED, PER_COMMAND = 0, 16
SECONDS = 20  # until an input counts as one that hangs

WHOLE = ["-1", "0", "1", "3", "7", "1e3", "1.5", "", "nan", "0x10", "1_0", "٣", "--", "99999999999999999999"]
NUMBERS = ["-1", "0", "1", "0.5", "1e-320", "1e400", "-inf", "nan", "", "1,5", "0x1p3", "½", "--"]
WORDS = [
    "", " ", "none", "None", "..", "a,b", "[]", "{", "\x1b[31mred", "a\nb", "\udcff", "ü" * 3000, "x" * 300,
    "/dev/null", "/proc/self/mem", "ROOM/text", "ROOM/text/a.txt", "ROOM/bytes.bin", "ROOM/other.json", "ROOM/pipe",
    "ROOM/run", "ROOM/run/config.yaml", "ROOM/data", "ROOM/data/dataset.json", "ROOM/export", "ROOM/export/config.json",
    "ROOM/dense", "ROOM/missing/deep", "ROOM/trial.yaml",
]  # fmt: skip
# Large values of these are much work, or a large model, which somebody may want.
AMOUNT = re.compile(
    r"--(steps|settle|rounds|repetitions|max-new|sample-tokens|workers|vocab-size|model|num-experts|k$)"
)
# ROOM is the folder with one of each thing that a command may be given.
BASES = {
    "train": ["--data", "ROOM/data", *FLAGS, "--steps", "1", "--out", "run"],
    "generate": ["ROOM/run", "--max-new-tokens", "3"],
    "eval": ["ROOM/run"],
    "report": ["ROOM/run", "--out", "page.html", "--max-tokens", "200"],
    "record": ["ROOM/run", "--out", "record.parquet", "--max-tokens", "200"],
    "export": ["ROOM/run", "out"],
    "convert upcycle": ["ROOM/dense", "out", "--data", "ROOM/data", "--sample-tokens", "64"],
    "convert relufy": ["ROOM/topk", "out", "--data", "ROOM/data", "--sample-tokens", "64"],
    "convert megatron": ["ROOM/data", "out"],
    "compare": ["ROOM/trial.yaml", "--data", "ROOM/data", "--list"],
    "plan": ["tiny"],
    "bench layer": [],
    "bench decode": [],
    "bench generate": [],
    "bench lora": [],
    "bench train-step": ["--data", "ROOM/data"],
    "bench diff": ["ROOM/other.json", "ROOM/other.json"],
    "data prepare": ["ROOM/text", "--out", "out", "--vocab-size", "300"],
    "data check": ["ROOM/data"],
}


@pytest.fixture(scope="module")
def room(corpus, tmp_path_factory):
    room = tmp_path_factory.mktemp("room")
    with contextlib.redirect_stdout(io.StringIO()):
        for name, options in {"run": [], "topk": ["--router", "topk"]}.items():
            command = ["train", "--data", str(corpus), *FLAGS, "--steps", "2", "--out", str(room / name), *options]
            assert main(command) == 0
        assert main(["export", str(room / "run"), str(room / "export")]) == 0
    shutil.copytree(corpus, room / "data")
    shutil.copytree(corpus.parent / "text" / "farm", room / "text")
    (room / "text" / "a.txt").write_text("cow sheep\n" * 500)
    (room / "bytes.bin").write_bytes(bytes(range(256)) * 9)
    (room / "other.json").write_text("{}")
    os.mkfifo(room / "pipe")
    base = {"steps": 1, "seq_len": 32, "batch_size": 2, "model": {"hidden_size": 32, "num_hidden_layers": 1}}
    (room / "trial.yaml").write_text(json.dumps({"base": base, "variants": {"relu": {}}, "equal_flops": False}))
    tokenizer = AutoTokenizer.from_pretrained(room / "data" / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(room / "dense")
    tokenizer.save_pretrained(room / "dense")
    return room


@pytest.fixture
def nothing_measured(monkeypatch):
    def refuse(*_, **__):
        raise ConfigError("not measured")

    for module, function in ((roofline, "measure_roofline"), (train_step, "train_step")):
        monkeypatch.setattr(module, function, refuse)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def contents(room):
    """What nothing may change: every file, its content and its permissions."""
    found = {}
    for path in sorted(room.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, path.read_bytes() if path.is_file() else b"")
    return found


def options_of(name):
    """Flags of a command and the kind of their value, from its help."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        main([*name.split(), "--help-all"])
    found = re.findall(r"^[ │]{1,2}(--[a-z][\w.-]*) +(?:\{None\}\|)?([A-Z]+|\[STR)", shown.getvalue(), re.MULTILINE)
    assert found or name in ("export", "bench diff", "data check")
    return found


def generated(name):
    """Command lines: the base of the command with one or two of its arguments replaced, or options added."""
    choose = random.Random(f"{name} {SEED}")
    options = options_of(name)
    for _ in range(PER_COMMAND):
        base = list(BASES[name])
        for _ in range(choose.choice((1, 1, 2))):
            positional = [i for i, word in enumerate(base) if i < 2 and not (base[0] + word).startswith("-")]
            if positional and (not options or choose.random() < 0.25):
                base[choose.choice(positional)] = choose.choice(WORDS)
                continue
            flag, kind = choose.choice(options)
            values = {"INT": WHOLE, "FLOAT": NUMBERS}.get(kind, WORDS)
            if AMOUNT.match(flag):
                values = [value for value in values if len(value) < 5]
            base += [flag, choose.choice(values)]
        yield [*name.split(), *base]


class Hangs(BaseException):
    """Nothing in the package catches it."""


@contextlib.contextmanager
def limited():
    def stop(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault(command, capfd):
    """What is wrong with how a command ended; empty if it gave a result, or one line and exit code 2."""
    try:
        with limited():
            code = main(command)
    except BaseException as error:  # of any kind: it would have been a traceback
        return f"{type(error).__name__}: {error}"
    errors = capfd.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("remoe: error: ")]
    if code not in (0, 2) or len(lines) != (code == 2) or "Traceback" in errors:
        return f"exit code {code}, {errors[-300:]!r}"
    if lines and (errors.splitlines()[-1] != lines[0] or len(lines[0]) > LONGEST_ERROR + 20 or "\x1b" in lines[0]):
        return f"more than a line: {errors[-300:]!r}"
    return ""


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("serve", "watch")])  # those never end
@pytest.mark.slow
def test_every_command_line_gives_a_result_or_one_line(name, room, tmp_path, monkeypatch, capfd, nothing_measured):
    before, faults = contents(room), {}
    for number, command in enumerate(generated(name)):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        command = [word.replace("ROOM", str(room)) for word in command]
        if found := fault(command, capfd):
            faults[" ".join(command).encode("ascii", "backslashreplace").decode()[:400]] = found
        after = contents(room)
        assert {path: after.get(path) for path in before} == before, command
    assert not faults, "\n".join(f"{command}\n    {found}" for command, found in faults.items())
