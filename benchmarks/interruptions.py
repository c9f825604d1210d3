"""Kills `remoe train`, `data prepare`, `compare` and `export` at random moments, and compares how they end.

    python benchmarks/interruptions.py --work FOLDER --results benchmarks/results/NAME.json

Each command is first given once undisturbed. Then it is killed at a moment drawn from the time that this took, given
again, and so on until all signals are spent, and then it is left alone. Its files must equal those of the undisturbed
one, bit for bit, except for times and speeds. The seed fixes signals and moments, as shares of the time.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import tyro

from remoe.lab.machine import machine, pick_device

SIGNALS = [signal.SIGKILL] * 5 + [signal.SIGTERM, signal.SIGHUP] * 3
VARIES = re.compile(  # in files of text: times, speeds, memory, and what says how often a run was continued
    r'"[a-z_]*(seconds|second|time|date|bytes|minutes|started|machine|resumed)[a-z_]*": *("[^"]*"|\{[^}]*\}|[^,}\n]*)'
)
# Of a result; of SIGKILL; of the others while the program works, and before it has begun or after its end.
CODES = (0, -9, 129, 143, -1, -15)
# Checksums, tables and records contain such times; the files that they are of are compared themselves.
LEFT_OUT = re.compile(r"tensorboard|\.log$|\.lock$|checksums\.json$|results\.md$|^pool/[^/]*\.json$")
TINY = {
    "steps": 60, "seq_len": 32, "batch_size": 4, "micro_batch_size": 2, "num_experts": 4,
    "model": {"hidden_size": 32, "num_hidden_layers": 2}, "validate": {"every": 20}, "checkpoint": {"every": 10},
}  # fmt: skip


@dataclass
class Options:
    """Interrupt commands at random."""

    work: Path
    """Folder for everything that the commands write; emptied first."""
    results: Path | None = None
    """JSON file to write."""
    tasks: tuple[str, ...] = ("train", "prepare", "compare", "export")
    """What to interrupt; the rest of a results file that is there already stays."""
    seed: int = 0
    """Seed of the moments and of the order of the signals."""


def flags(options: dict, prefix: str = "") -> list[str]:
    """Options as flags of `remoe train`."""
    found = []
    for name, value in options.items():
        flag = prefix + name.replace("_", "-")
        found += flags(value, f"{flag}.") if isinstance(value, dict) else [f"--{flag}", str(value)]
    return found


def command(task: str, work: Path, out: Path) -> list[str]:
    """The command line of a task that writes into `out`, or goes on there."""
    data = ["--data", str(work / "data")]
    if task == "train":
        resume = ["--resume"] if (out / "config.yaml").exists() else [*data, *flags(TINY)]
        return ["train", "--out", str(out), *resume]
    if task == "prepare":
        sizes = ["--vocab-size", "600", "--shard-tokens", "20000"]
        return ["data", "prepare", str(work / "text"), "--out", str(out), *sizes]
    if task == "compare":
        return ["compare", str(work / "trial.yaml"), *data, "--pool", str(out / "pool"), "--out", str(out / "tables")]
    return ["export", str(work / "run"), str(out)]


def files_of(folder: Path) -> dict[str, str]:
    """Hash of each file that has to come out the same, without what varies from run to run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or LEFT_OUT.search(name):
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".md", ".yaml"):
            text = content.decode().replace(str(folder), "").replace(f"# {folder.name}\n", "")
            content = VARIES.sub("", text).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def run(arguments: list[str], log: Path, after: float | None = None, number: int = 0) -> tuple[int, float]:
    """Exit code and seconds of a command; `after` so many seconds it gets a signal, SIGHUP with all its children."""
    started = time.monotonic()
    with log.open("ab") as file:
        full = [sys.executable, "-m", "remoe", *arguments]
        process = subprocess.Popen(full, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number) if number == signal.SIGHUP else process.send_signal(number)
        return process.wait(), time.monotonic() - started


def interrupt(task: str, work: Path, choose: random.Random) -> dict:
    """Gives a command undisturbed and disturbed; returns what happened."""
    log, disturbed = work / f"{task}.log", work / f"{task}-disturbed"
    code, seconds = run(command(task, work, work / task), log)
    assert code == 0, f"{task} fails undisturbed: see {log}"
    expected, events = files_of(work / task), []
    for number in [*choose.sample(SIGNALS, len(SIGNALS)), None]:
        share = round(choose.random(), 3)
        code, _ = run(command(task, work, disturbed), log, None if number is None else share * seconds, number or 0)
        event = {"signal": number and number.name, "after": share, "exit_code": code}
        # It was left alone, or the signal came too late: now compare, and begin anew. An export is there or it is not.
        if code == 0 or (task == "export" and disturbed.exists()):
            found = files_of(disturbed)
            names = expected.keys() | found.keys()
            event["differ"] = sorted(name for name in names if expected.get(name) != found.get(name))
            shutil.rmtree(disturbed)
        events.append(event)
        print(task, event, flush=True)
    return {"seconds": round(seconds, 1), "files": len(expected), "events": events}


def main(options: Options) -> int:
    work = options.work
    shutil.rmtree(work, ignore_errors=True)
    for domain in ("one", "two"):
        (work / "text" / domain).mkdir(parents=True)
    source = [path for path in sorted(Path(json.__file__).parent.glob("*.py")) if path.stat().st_size > 2000]
    for index, path in enumerate([*source, *sorted(Path(os.__file__).parent.glob("[a-d]*.py"))[:40]]):
        shutil.copy(path, work / "text" / ("one", "two")[index % 2] / f"{index}.txt")
    options_of_runs = TINY | {"steps": 30}
    trial = {"base": options_of_runs, "variants": {"relu": {}, "topk": {"router": "topk"}}, "equal_flops": False}
    (work / "trial.yaml").write_text(json.dumps(trial))  # JSON is YAML
    log = work / "begin.log"
    assert run(command("prepare", work, work / "data"), log)[0] == 0, f"see {log}"
    assert run(command("train", work, work / "run"), log)[0] == 0, f"see {log}"
    there = options.results is not None and options.results.exists()
    tasks = json.loads(options.results.read_text())["tasks"] if there else {}
    for task in options.tasks:
        tasks[task] = interrupt(task, work, random.Random(f"{task} {options.seed}"))
        if options.results:
            record = {"date": str(date.today()), "machine": machine(pick_device("cpu")), "seed": options.seed}
            options.results.write_text(json.dumps(record | {"tasks": tasks}, indent=1) + "\n")
    events = [event for task in tasks.values() for event in task["events"]]
    wrong = [event for event in events if event.get("differ") or event["exit_code"] not in CODES]
    print(f"{len(events) - len(tasks)} signals, {sum('differ' in event for event in events)} ends, {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
