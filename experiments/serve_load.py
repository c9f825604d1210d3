"""Loads `remoe serve` with many clients, of which some go away, and checks every text that it writes.

    python experiments/serve_load.py FOLDER --minutes 5 --out experiments/results/serve-load.json

starts `remoe serve FOLDER --continuous-batching` on this machine. Each of the 32 clients sends one request after the
other by OpenAI's client: prompts of 1 to about 400 tokens, 1 to 48 tokens of text at temperature 0, half of them
streamed. A quarter of the requests ask for a very long text, and the client closes the connection in the middle. In the
middle of the run and at its end, all clients go away at once in the midst of very long texts.

The result says how many texts differ from those of `generate_text` for the same prompt alone, how the memory of the
server grows, how long the texts of clients that have gone stay in the batch, and how long 32 equal requests take before
and after that.

    python experiments/serve_load.py FOLDER --mixtral MIXTRAL
    python experiments/serve_load.py FOLDER --speed remoe --out experiments/results/serve-speed.json
    python experiments/serve_load.py MIXTRAL --speed mixtral --out experiments/results/serve-speed.json

writes a Mixtral of transformers with the sizes of FOLDER and random weights, and measures throughput and latency of
both behind the same server, for 1, 8 and 32 clients. The file has the results of both; when a command is repeated, it
keeps the fastest run for each number of clients, because other programs can only slow a run down. A run takes about a
minute with the preset `tiny`.
"""

import argparse
import asyncio
import json
import logging
import random
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import openai
import psutil
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from remoe.lab.generation import SamplingOptions, generate_text
from remoe.lab.machine import machine
from remoe.lab.training.load import load_model
from remoe.models.modeling_remoe import RemoeForCausalLM

CLIENTS, LONGEST, ENDLESS = 32, 48, 100_000  # tokens of a text: the longest that is waited for, and of the others
LEAVING = 0.25  # share of the requests whose client goes away
PROMPTS, CHARACTERS = 64, 1200
SPEED_TOKENS, ROUNDS = 32, 3
MIB = 2**20


class Server:
    """A `remoe serve` of its own, seen from outside."""

    def __init__(self, url: str, name: str, process: psutil.Process) -> None:
        self.url, self.name, self.process = url, name, process
        self.client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)

    def complete(self, prompt: str, tokens: int, stream: bool) -> Any:
        """A request of OpenAI's client, at temperature 0."""
        return self.client.completions.create(
            model=self.name, prompt=prompt, max_tokens=tokens, temperature=0, stream=stream
        )

    def generating(self) -> int:
        """How many texts the server is writing, or has queued."""
        with urllib.request.urlopen(self.url.removesuffix("v1") + "load", timeout=60) as answer:
            return json.load(answer)["generating"]

    async def becomes(self, number: int) -> float:
        """Seconds until the server is writing so many texts."""
        start = time.monotonic()
        while await asyncio.to_thread(self.generating) != number:
            if time.monotonic() - start > 60:
                raise SystemExit(f"after a minute, the server is writing {self.generating()} texts, not {number}")
            await asyncio.sleep(0.01)
        return time.monotonic() - start


@contextmanager
def started(folder: Path) -> Iterator[Server]:
    """Context in which `remoe serve` runs."""
    command = [sys.executable, "-m", "remoe", "serve", str(folder), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen([*command, "--continuous-batching"], stdout=subprocess.PIPE, text=True)
    try:
        said = [process.stdout.readline().split() for _ in range(3)]
        yield Server(said[0][1], said[1][1], psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def make_prompts() -> list[str]:
    """Pieces of a module of Python, from one character up."""
    source, rng = Path(textwrap.__file__).read_text(), random.Random(0)
    starts = [rng.randrange(len(source) - CHARACTERS) for _ in range(PROMPTS)]
    return [source[start : start + 1 + CHARACTERS * i // PROMPTS] for i, start in enumerate(starts)]


class Load:
    """The requests of all clients, and what came of them."""

    def __init__(self, server: Server, expected: dict[tuple[str, int], str]) -> None:
        self.server, self.expected, self.cases = server, expected, list(expected)
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, str]] = []
        self.tokens = 0

    async def client(self, number: int, until: float) -> None:
        """One client, with requests one after the other."""
        rng = random.Random(f"{number} {until}")
        while time.monotonic() < until:
            prompt, tokens = rng.choice(self.cases)
            stream = rng.random() < 0.5
            if rng.random() < LEAVING:
                await self.leave(prompt, stream, rng)
            else:
                await self.check(prompt, tokens, stream)

    async def check(self, prompt: str, tokens: int, stream: bool) -> None:
        """A request whose text must be right."""
        expected = self.expected[prompt, tokens]
        answer = await self.server.complete(prompt, tokens, stream)
        if stream:
            pieces = [piece async for piece in answer]
            text, expected = "".join(piece.choices[0].text for piece in pieces), expected.rstrip("\ufffd")
            self.tokens += pieces[-1].usage.completion_tokens
        else:
            text = answer.choices[0].text
            self.tokens += answer.usage.completion_tokens
        self.counts["streamed" if stream else "whole"] += 1
        if text != expected:
            self.wrong.append({"prompt": prompt, "text": text, "expected": expected})

    async def leave(self, prompt: str, stream: bool, rng: random.Random) -> None:
        """A request of a client that goes away."""
        if stream:
            answer, left = await self.server.complete(prompt, ENDLESS, stream), rng.randint(1, 8)
            async for _ in answer:
                left -= 1
                if not left:
                    break
            await answer.close()
        else:
            waiting = asyncio.ensure_future(self.server.complete(prompt, ENDLESS, stream))
            await asyncio.sleep(rng.uniform(0, 1))
            waiting.cancel()
            await asyncio.wait([waiting])
        self.counts["left while streamed" if stream else "left while whole"] += 1

    async def wave(self) -> dict[str, float]:
        """All clients go away at once; seconds of equal requests before and after, and until the batch is empty."""
        await self.server.becomes(0)
        before = await self.equal_requests()
        cases = self.cases[:CLIENTS]
        waiting = [asyncio.ensure_future(self.server.complete(prompt, ENDLESS, False)) for prompt, _ in cases]
        await self.server.becomes(CLIENTS)
        for one in waiting:
            one.cancel()
        freed = await self.server.becomes(0)
        self.counts["left while whole"] += CLIENTS
        return {"before": before, "until the batch is empty": freed, "after": await self.equal_requests()}

    async def equal_requests(self) -> float:
        """Seconds of one request of every client, the same at each call."""
        start = time.monotonic()
        await asyncio.gather(*(self.check(*case, stream=False) for case in self.cases[:CLIENTS]))
        return time.monotonic() - start


async def watch(server: Server, memory: list[tuple[float, float]]) -> None:
    """Records the memory of the server, once a second."""
    start = time.monotonic()
    while True:
        memory.append((round(time.monotonic() - start), round(server.process.memory_info().rss / MIB, 1)))
        await asyncio.sleep(1)


async def run_load(server: Server, expected: dict[tuple[str, int], str], minutes: float) -> dict[str, Any]:
    """Two halves, and a wave of clients that go away after each."""
    load, memory = Load(server, expected), []
    await load.equal_requests()
    watching = asyncio.ensure_future(watch(server, memory))
    waves, start = [], time.monotonic()
    for half in (1, 2):
        until = start + 30 * minutes * half
        await asyncio.gather(*(load.client(number, until) for number in range(CLIENTS)))
        waves.append(await load.wave())
    watching.cancel()
    quarters = [memory[len(memory) * i // 4 : len(memory) * (i + 1) // 4] for i in range(4)]
    return {
        "seconds": round(time.monotonic() - start),
        "requests": dict(load.counts),
        "tokens of the whole texts": load.tokens,
        "wrong texts": len(load.wrong),
        "examples of wrong texts": load.wrong[:3],
        "MiB of the server, median of each quarter": [median(mib for _, mib in quarter) for quarter in quarters],
        "MiB of the server, growth from start to end": round(memory[-1][1] - memory[0][1], 1),
        "MiB of the server, slope of the last half, per minute": slope(memory[len(memory) // 2 :]),
        "MiB of the server after seconds": dict(memory[:: max(1, len(memory) // 20)]),
        "seconds of 32 equal requests, and until the batch is empty when their clients go away": [
            {name: round(seconds, 2) for name, seconds in wave.items()} for wave in waves
        ],
    }


def slope(memory: list[tuple[float, float]]) -> float:
    """MiB per minute, by least squares."""
    return round(60 * linear_regression(*zip(*memory, strict=True)).slope, 3)


def load_test(folder: Path, minutes: float) -> dict[str, Any]:
    """Runs the load on a folder."""
    model, tokenizer, _ = load_model(folder)
    logging.disable(logging.WARNING)  # of each prompt that is longer than the sequences of training
    rng, expected = random.Random(1), {}
    for prompt in make_prompts():
        tokens = rng.randint(1, LONGEST)
        options = SamplingOptions(temperature=0, max_new_tokens=tokens)
        expected[prompt, tokens] = generate_text(model, tokenizer, prompt, options)
    with started(folder) as server:
        return {"clients": CLIENTS, **asyncio.run(run_load(server, expected, minutes))}


def mixtral_of(model: RemoeForCausalLM) -> MixtralForCausalLM:
    """transformers' Mixtral with the sizes of a model of ours, and random weights."""
    ours = model.config
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(ours, name) for name in same},
            intermediate_size=model.model.layers[0].mlp.experts.down_proj.shape[2],
            num_local_experts=ours.num_experts,
            num_experts_per_tok=ours.num_experts_per_tok,
            max_position_embeddings=ours.max_position_embeddings,
            tie_word_embeddings=ours.tie_word_embeddings,
        )
    )


async def measure(server: Server) -> dict[str, dict[str, float]]:
    """Speed by number of clients, each of which streams one text at a time."""
    prompts = [prompt[-150:] for prompt in make_prompts()[-CLIENTS:]]
    await asyncio.gather(*(stream_timed(server, prompt) for prompt in prompts[:2]))  # makes the cache
    return {str(clients): await speed(server, prompts[:clients]) for clients in (1, 8, CLIENTS)}


async def speed(server: Server, prompts: list[str]) -> dict[str, float]:
    """Medians of rounds in which every prompt is continued at the same time."""
    rates, firsts, wholes = [], [], []
    for _ in range(ROUNDS):
        start = time.monotonic()
        answers = await asyncio.gather(*(stream_timed(server, prompt) for prompt in prompts))
        rates.append(sum(tokens for *_, tokens in answers) / (time.monotonic() - start))
        firsts += [first for first, *_ in answers]
        wholes += [whole for _, whole, _ in answers]
    return {
        "tokens per second": round(median(rates), 1),
        "seconds to the first piece": round(median(firsts), 3),
        "seconds of a text": round(median(wholes), 3),
    }


async def stream_timed(server: Server, prompt: str) -> tuple[float, float, int]:
    """Seconds to the first piece and to the last, and the number of tokens."""
    start, pieces = time.monotonic(), []
    async for piece in await server.complete(prompt, SPEED_TOKENS, True):
        pieces.append((time.monotonic() - start, piece))
    return pieces[0][0], pieces[-1][0], pieces[-1][1].usage.completion_tokens


def with_run(before: dict[str, Any], name: str, run: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Results with one more run of a model, of which the fastest stays for each number of clients."""
    model = before.get(name, {})
    fastest = {
        clients: max(model.get(clients, measured), measured, key=lambda one: one["tokens per second"])
        for clients, measured in run.items()
    }
    return {**before, name: {"runs": model.get("runs", 0) + 1, **fastest}}


def write_mixtral(folder: Path, out: Path) -> None:
    """A folder with transformers' Mixtral in the sizes of a model of ours."""
    model, tokenizer, _ = load_model(folder)
    mixtral_of(model).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--mixtral", type=Path)
    parser.add_argument("--speed", choices=["remoe", "mixtral"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.mixtral:
        write_mixtral(options.folder, options.mixtral)
        return 0
    if options.speed:
        with started(options.folder) as server:
            measured = asyncio.run(measure(server))
        before = json.loads(options.out.read_text()) if options.out.exists() else {}
        what, result = "--speed NAME", {"tokens of a text": SPEED_TOKENS, **with_run(before, options.speed, measured)}
    else:
        what, result = f"--minutes {options.minutes:g}", load_test(options.folder, options.minutes)
    command = f"python experiments/serve_load.py FOLDER {what} --out {options.out}"
    result = {**result, "command": command, "machine": machine(torch.device("cpu"))}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if result.get("wrong texts") else 0


if __name__ == "__main__":
    sys.exit(main())
