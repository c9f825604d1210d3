"""A tiny random model of each architecture that `relufy` converts: forward, backward, generation, saving, loading.

    python examples/relufy_architectures.py [MODEL_TYPE ...]

Prints a line for each. Needs no data and no network; some seconds.
"""

import argparse
import tempfile

import torch
import transformers
from packaging import version
from tiny_models import MIXTURES, SINCE_5_23, build, token_ids

import remoe


def convert_and_use(model_type: str) -> str:
    """What happened, in a line."""
    model, ids = build(model_type), token_ids()
    report = remoe.relufy(model, [ids], max_loss_increase=None)  # random weights: no loss to keep

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = model(input_ids=ids, labels=ids).loss  # lambda times the penalty is in it
    loss.backward()
    optimizer.step()
    model.update_routing()

    model.eval()
    text = model.generate(ids[:1, :4], max_new_tokens=8, do_sample=False, eos_token_id=None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = remoe.load_relufied(folder).eval()
    with torch.no_grad():
        same = torch.equal(again(ids).logits, model(ids).logits)
    if not same or text.shape[1] != 12:
        raise SystemExit(f"{model_type}: the loaded model computes something else, or generation stopped early")
    active = sum(report.experts_per_token) / len(report.experts_per_token)
    return (
        f"{type(model).__name__:<36} {len(report.routers)} routers, {active:.2f} of {report.num_experts} experts, "
        f"loss {report.loss_before:.3f} -> {report.loss_after:.3f}, step, generate, save, load: ok"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_type", nargs="*", metavar="MODEL_TYPE", help=f"of {', '.join(MIXTURES)}; all by default")
    chosen = parser.parse_args().model_type or [*MIXTURES]
    if unknown := [model_type for model_type in chosen if model_type not in MIXTURES]:
        parser.error(f"unknown model type {unknown[0]}")
    transformers.logging.disable_progress_bar()
    for model_type in chosen:
        if model_type in SINCE_5_23 and version.parse(transformers.__version__) < version.parse("5.23"):
            print(f"{model_type}: needs transformers 5.23")
        else:
            print(convert_and_use(model_type))


if __name__ == "__main__":
    main()
