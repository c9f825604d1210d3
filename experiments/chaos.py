"""Kills ranks of a sharded run at random moments, and shows that nothing is lost.

    python experiments/chaos.py WORK --out experiments/results/chaos.json

trains a tiny model three times, to the same number of steps. The first run is undisturbed, on 4 ranks. The second
starts on 4 ranks under torchrun's agent, which restarts them; at random moments a random rank is killed by SIGKILL.
Then the agent gets SIGTERM, and the run is resumed on 2 ranks, gets SIGTERM again, and ends on one process. The third,
the control, is on 4 ranks, 2 and one in the same steps, without kills. Every rank records a hash of each window that it
reads. The result says whether the windows of each step, in its last execution, are those of the undisturbed run, each
exactly once; how far the losses are from those of the undisturbed run, and whether all figures equal those of the
control; and whether after every kill all folders that are named like checkpoints were whole. With `--minutes`, the
runs stop after about so long; the same command goes on.
"""

import argparse
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
from collections import defaultdict
from pathlib import Path

MODEL = """
    --seq-len 16 --batch-size 8 --micro-batch-size 8 --model.hidden-size 16 --model.num-hidden-layers 2
    --model.num-attention-heads 2 --num-experts 4 --device cpu --checkpoint.every 10 --print-every 100
    --validate.every 100000 --validate.max-tokens 500
"""
MESHES = {4: "fsdp=4,ep=2", 2: "fsdp=2,ep=2"}
FEW = 50  # steps, in which rounding has not grown yet
PATIENCE = 300  # seconds in which something must happen
MEASURED = re.compile("per_second|share|memory")  # what differs between equal runs


def launch_ranks(ranks: int, restarts: int, *arguments: object) -> None:
    """The agent of torchrun, whose ranks are forked: they need not import PyTorch anew after every kill."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from remoe.lab.training import train  # noqa: F401 - imported before the fork

    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "run_id": "chaos"}
    config = LaunchConfig(1, 1, ranks, start_method="fork", max_restarts=restarts, monitor_interval=0.1, **where)
    elastic_launch(config, work)(*arguments)


def work(records: Path, last: int, argv: list[str]) -> None:
    """Runs `remoe ARGV` as one rank, which records the windows that it reads; SIGTERM stops it after step `last`."""
    rank, attempt = (int(os.environ.get(name, 0)) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    with (records / f"{attempt:03d}-{rank}-{os.getpid()}").open("w", buffering=1) as file:
        from remoe.lab.cli.main import main
        from remoe.lab.data import TrainBatches

        read = TrainBatches.batch

        def recording(batches, step, rows=None):
            token_BS = read(batches, step, rows)
            numbers = range(len(token_BS)) if rows is None else rows
            hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in token_BS]
            file.write(json.dumps({"step": step + 1, "windows": dict(zip(numbers, hashes, strict=True))}) + "\n")
            if step + 1 == last:
                signal.raise_signal(signal.SIGTERM)
            return token_BS

        TrainBatches.batch = recording
        sys.exit(main(argv))


class Launch:
    """One start of a run: on several ranks, or of one process; `last` is a step after which it stops."""

    def __init__(
        self, folder: Path, number: int, ranks: int, steps: int, *flags: str, restarts: int = 0, last: int = 0
    ) -> None:
        self.run, self.records = folder / "run", folder / f"records-{number:02d}"
        self.records.mkdir(parents=True)
        if ranks > 1:
            flags = ("--mesh", MESHES[ranks], *flags)
        start = ["--launch", *map(str, (ranks, restarts, self.records, last))]
        command = ["train", "--data", str(folder.parent / "data"), "--out", str(self.run), "--steps", str(steps)]
        with (folder / f"output-{number}.txt").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *start, *command, *MODEL.split(), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def step(self) -> int:
        """The last step in the run's metrics."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
            return next(json.loads(line)["step"] for line in reversed(lines) if line.endswith("}"))
        except (OSError, StopIteration):
            return 0

    def attempt(self) -> list[tuple[int, int]]:
        """(rank, process) of the newest attempt."""
        names = [path.name.split("-") for path in self.records.iterdir()]
        newest = max((name[0] for name in names), default=None)
        return [(int(rank), int(process)) for attempt, rank, process in names if attempt == newest]

    def wait_for(self, condition) -> None:
        """Returns when a condition holds; fails when the run ends before."""
        until = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{self.run}: ended early, or nothing happened; see the output beside it")
            time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM, as a scheduler sends it; the seconds until the end."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return time.monotonic() - start


def kill_ranks(launch: Launch, ranks: int, kills: list[dict], options: argparse.Namespace) -> None:
    """Kills ranks at random moments: two thirds while the run trains, the others at any moment of a start.

    Adds to `kills` until there are enough or the time is over.
    """
    ended: set[int] = set()
    while len(kills) < options.kills and time.monotonic() < options.end:
        chance = random.Random(f"{options.seed} {len(kills)}")
        launch.wait_for(lambda known=ended: len({process for _, process in launch.attempt()} - known) == ranks)
        if chance.random() < 2 / 3:
            step = launch.step()
            launch.wait_for(lambda known=step: launch.step() not in (0, known))
        time.sleep(chance.uniform(0, 4))
        rank, process = chance.choice(launch.attempt())
        ended = {process for _, process in launch.attempt()}
        os.kill(process, signal.SIGKILL)
        kills.append({"rank": rank, "step": launch.step(), **checkpoints(launch.run)})
        print(f"kill {len(kills)} of {options.kills}: {kills[-1]}", flush=True)
    before = launch.step()
    launch.wait_for(lambda: launch.step() > before + 20)


def checkpoints(run: Path) -> dict[str, int]:
    """How many folders are named like checkpoints, and how many of them are not whole."""
    from remoe.errors import CheckpointError
    from remoe.lab.training.checkpoint import check_whole, list_checkpoints

    found, broken = list_checkpoints(run / "checkpoints"), 0
    for path in found:
        try:
            check_whole(path, verified=True)
        except CheckpointError:
            broken += path.exists()  # the next attempt may have deleted it meanwhile
    return {"checkpoints": len(found), "broken": broken}


def windows(folder: Path) -> tuple[dict[int, dict[str, str]], int]:
    """The windows of each step in its last execution, by row, and how many executions of steps there were.

    Raises:
        SystemExit: when two ranks read the same row.
    """
    executions: dict[int, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("records-*/*")):
        attempt = f"{path.parent.name}/{path.name.split('-')[0]}"
        for line in path.read_text().splitlines():
            if not line.endswith("}}"):
                continue  # the rank was killed while it wrote
            record = json.loads(line)
            rows = executions[record["step"]][attempt]
            if rows.keys() & record["windows"].keys():
                raise SystemExit(f"step {record['step']}: a row was read twice in one execution")
            rows |= record["windows"]
    return {step: of_step[max(of_step)] for step, of_step in executions.items()}, sum(map(len, executions.values()))


def metrics(folder: Path) -> dict[int, dict]:
    """The record of each step, without time and memory."""
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: {name: record[name] for name in record if not MEASURED.search(name)} for record in records}


def prepare(folder: Path) -> None:
    """Data of random words, so that no two windows are equal."""
    chance = random.Random(0)
    (folder / "text").mkdir(parents=True)
    for number in range(40):
        words = ("".join(chance.choices("abcdefghij", k=chance.randint(2, 7))) for _ in range(400))
        (folder / "text" / f"{number}.txt").write_text(" ".join(words))
    command = [sys.executable, "-m", "remoe", "data", "prepare", str(folder / "text"), "--out", str(folder / "data")]
    subprocess.run([*command, "--vocab-size", "300"], check=True, stdout=subprocess.DEVNULL)


def chaos(folder: Path, options: argparse.Namespace) -> dict:
    """The three runs and their comparison."""
    begun, steps, state = time.monotonic(), options.steps, folder / "state.json"
    if not state.exists():
        prepare(folder)
        if Launch(folder / "undisturbed", 0, options.ranks, steps).process.wait():
            raise SystemExit("the undisturbed run failed")
        state.write_text(json.dumps({"kills": [], "starts": [], "seconds": time.monotonic() - begun}))
        begun = time.monotonic()
    found = json.loads(state.read_text())
    kills, starts, before = found["kills"], found["starts"], found["seconds"]
    while not (starts and starts[-1]["last_step"] == steps):
        check_time(options)
        starts.append(disturb(folder / "disturbed", kills, starts, options))
        found["seconds"] = before + time.monotonic() - begun
        state.write_text(json.dumps(found))
    check_time(options)
    parts = [(start["ranks"], start["last_step"]) for start in starts]
    parts = [part for part, after in zip(parts, [*parts[1:], (0, 0)], strict=True) if part[0] != after[0]]
    control(folder / "control", parts)
    broken = sum(event["broken"] for event in kills + starts)
    minutes = round((before + time.monotonic() - begun) / 60, 1)
    events = {"steps": steps, "kills": kills, "starts": starts, "broken_checkpoints": broken, "minutes": minutes}
    return events | compare(folder, parts)


def check_time(options: argparse.Namespace) -> None:
    """Ends the command when its time is over."""
    if time.monotonic() > options.end:
        raise SystemExit("the time is over; the same command goes on")


def disturb(folder: Path, kills: list[dict], starts: list[dict], options: argparse.Namespace) -> dict:
    """Starts the run with kills once more: on all ranks until there are enough kills, then on 2, then on one."""
    ranks = options.ranks
    if len(kills) == options.kills:
        ranks = next(size for size in (2, 1) if size < starts[-1]["ranks"])
    flags = ["--resume"] if starts else []
    launch = Launch(folder, len(starts), ranks, options.steps, *flags, restarts=options.kills + 1)
    if ranks == 1:
        if launch.process.wait():
            raise SystemExit("the last start failed")
        return {"ranks": ranks, "last_step": launch.step(), **checkpoints(launch.run)}
    if len(kills) < options.kills:
        kill_ranks(launch, ranks, kills, options)
    else:
        first = launch.step()
        launch.wait_for(lambda: launch.step() > first + 100)
    seconds = round(launch.stop(), 1)
    return {"ranks": ranks, "last_step": launch.step(), "seconds_to_stop": seconds, **checkpoints(launch.run)}


def control(folder: Path, parts: list[tuple[int, int]]) -> None:
    """A run without kills that changes its number of ranks after the same steps."""
    shutil.rmtree(folder, ignore_errors=True)
    steps = parts[-1][1]
    for number, (ranks, last) in enumerate(parts):
        launch = Launch(folder, number, ranks, steps, *(["--resume"] if number else []), last=last % steps)
        if (launch.process.wait() == 0) != (last == steps) or launch.step() != last:
            raise SystemExit(f"the control did not stop after step {last}")


def compare(folder: Path, parts: list[tuple[int, int]]) -> dict:
    """How the run with kills differs from the other ones; `parts` has (ranks, last step) of each start."""
    (expected, _), (found, executed) = windows(folder / "undisturbed"), windows(folder / "disturbed")
    ours, theirs, same = (metrics(folder / name) for name in ("disturbed", "undisturbed", "control"))
    steps = parts[-1][1]
    return {
        "steps_executed": executed,
        "steps_recorded_once": sorted(ours) == list(range(1, steps + 1)),
        "windows": sum(map(len, found.values())),
        "windows_equal": found == expected and len(expected) == steps,
        "equal_to_control_bit_for_bit": ours == same,
        "largest_relative_difference_of_losses": differences(ours, theirs, parts),
        "first_step_with_another_sparsity": next(
            (step for step in sorted(ours) if ours[step]["sparsity"] != theirs[step]["sparsity"]), None
        ),
    }


def differences(ours: dict[int, dict], theirs: dict[int, dict], parts: list[tuple[int, int]]) -> dict[str, float]:
    """The largest relative difference of the losses in each part of a run, and in its first steps."""
    loss = {n: abs(ours[n]["lm_loss"] - theirs[n]["lm_loss"]) / theirs[n]["lm_loss"] for n in theirs}
    first, found = 1, {}
    for size, last in parts:
        for end in sorted({min(first + FEW - 1, last), last}):
            found[f"{size} ranks, steps {first} to {end}"] = max(loss[n] for n in range(first, end + 1))
        first = last + 1
    return found


def main() -> int | None:
    """The command."""
    if sys.argv[1:2] == ["--launch"]:
        ranks, restarts, records, last, *argv = sys.argv[2:]
        arguments = (Path(records), int(last), argv)
        return launch_ranks(int(ranks), int(restarts), *arguments) if int(ranks) > 1 else work(*arguments)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path, help="a new folder")
    parser.add_argument("--out", type=Path, required=True, help="the result, JSON")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4, choices=MESHES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after about so long")
    options = parser.parse_args()
    import torch

    from remoe.lab.machine import machine

    options.end = time.monotonic() + 60 * options.minutes
    sizes = " ".join(f"--{name} {getattr(options, name)}" for name in ("steps", "kills", "ranks", "seed"))
    result = {"command": f"python experiments/chaos.py WORK {sizes}", "machine": machine(torch.device("cpu"))}
    result |= chaos(options.work.resolve(), options)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    whole = result["windows_equal"] and result["equal_to_control_bit_for_bit"]
    return 0 if whole and not result["broken_checkpoints"] else 1


if __name__ == "__main__":
    sys.exit(main())
