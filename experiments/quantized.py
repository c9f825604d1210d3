"""Exports a run with smaller weights, and measures each export: size, validation loss, speed of writing text.

    OMP_NUM_THREADS=1 python experiments/quantized.py RUN --out experiments/results/quantized.json

exports RUN as it is, with `--quantize int8` and with `--quantize int4`, and loads every export from its folder. The
loss is that of the same validation tokens. The models write in turn, 64 tokens after one token, and the file has the
median of the rounds.
"""

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from remoe.lab.analysis.collect import gates_of
from remoe.lab.analysis.texts import PreparedText
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.export import export_run
from remoe.lab.machine import machine
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_model
from remoe.lab.training.validate import evaluate, total
from remoe.models.modeling_remoe import RemoeForCausalLM

FORMS = {"float32": None, "int8": "int8", "int4": "int4"}
NEW_TOKENS = 64


def seconds_of_text(model: RemoeForCausalLM) -> float:
    """Seconds in which a model writes."""
    ids, start = torch.ones(1, 1, dtype=torch.long), time.perf_counter()
    model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
    return time.perf_counter() - start


def measure(run: Path, max_tokens: int, rounds: int) -> dict[str, object]:
    """Figures of each export of a run."""
    options = RunFolder(run).load_config()
    windows = ValidationWindows(open_dataset(options.data).validation, options.seq_len)
    (batch, *_) = PreparedText(windows, max_tokens).batches(8)
    models, results = {}, {}
    with TemporaryDirectory() as place:
        for name, scheme in FORMS.items():
            folder = export_run(run, Path(place) / name, scheme=scheme)
            models[name] = load_model(folder)[0].eval()
            loss = total(evaluate(models[name], windows, batch_size=8, max_tokens=max_tokens)).loss
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            results[name] = {"bytes of the weights' files": size, "validation loss": loss}
    active = gates_of(models["float32"], batch.input_NS, batch.mask_NS) != 0
    seconds = {name: [] for name in FORMS}
    for count in range(1 + rounds):
        for name, model in models.items():
            taken = seconds_of_text(model)
            if count:  # the first round is to warm up
                seconds[name].append(taken)
    for name, taken in seconds.items():
        results[name]["tokens per second"] = round(NEW_TOKENS / statistics.median(taken), 1)
        results[name]["seconds of each round"] = [round(one, 4) for one in taken]
    return {
        "router": options.router,
        "steps": options.steps,
        "validation tokens, at most": max_tokens,
        "active experts per token": float(active.sum() / (active.shape[0] * active.shape[1])),
        **results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    measured = measure(args.run, args.max_tokens, args.rounds)
    command = f"python experiments/quantized.py RUN --out {args.out}"
    described = machine(torch.device("cpu")) | {"torchao": version("torchao")}
    result = {"command": command, "machine": described, **measured}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
