"""TRL's GRPO on a tiny ReMoE model: training uses the experts of a bfloat16 pass over the samples.

    python examples/grpo_replay.py --steps 4

Samples are drawn in bfloat16 and trained on in float32, as with an engine that samples in another precision. The pairs
of a second bfloat16 pass, over the finished samples, are recorded and replayed. Prints, for each step, the share of
pairs on which the two precisions disagree, lambda and the sparsity of the model's own router. Needs trl and datasets;
runs on a CPU in seconds.
"""

import argparse
import tempfile

import datasets
import torch
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import remoe
from remoe.integrations.trainer import SparsityCallback, routed_module
from remoe.models.modes import evaluating
from remoe.models.replay import replay_routing
from remoe.routing.replay import Replay, disagreement, executed_pairs

WORDS = 64
PAIRS = "routed_pairs"  # (B, S, L, E) bool, a row for each sample, which TRL shuffles and splits with the others


class ReplayingGRPOTrainer(trl.GRPOTrainer):
    """GRPO whose training passes execute the pairs of a bfloat16 pass, with the model's penalty in the loss."""

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        module = routed_module(self.model)
        # In training mode, the passes of sampling would count for lambda.
        with evaluating(module), torch.autocast(module.device.type, torch.bfloat16):
            batch = super()._generate_and_score_completions(inputs)
            routings = module.base_model(**_passed(batch)).routings
            B, S = _passed(batch)["input_ids"].shape
            batch[PAIRS] = torch.stack([executed_pairs(one).view(B, S, -1) for one in routings], dim=2)
        return batch

    def _compute_loss(self, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        module, found = routed_module(model), []
        replay = Replay(list(inputs[PAIRS].flatten(0, 1).unbind(dim=1)))
        # TRL calls the transformer and a head of its own, so the model's forward adds no penalty and counts nothing.
        hook = module.base_model.register_forward_hook(lambda _module, _args, output: found.append(output.routings))
        try:
            with replay_routing(module, replay):  # with gradient checkpointing, the backward pass would belong here too
                loss = super()._compute_loss(model, inputs)
        finally:
            hook.remove()
        (routings,) = found
        module.sparsity.observe(routings)
        share_L = disagreement(replay.active_LTE, [executed_pairs(one.own) for one in routings])
        self._metrics["train"]["pairs_that_differ"].append(share_L.mean().item())
        return loss + module.sparsity.loss_terms(routings).total / self.current_gradient_accumulation_steps


def _passed(batch: dict) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
    }


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    model = Tokenizer(WordLevel(words, unk_token="w2"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", padding_side="left")


def reward(completions: list[str], **_: object) -> list[float]:
    """The share of even words."""
    numbers = [[int(word[1:]) for word in text.split()] for text in completions]
    return [sum(n % 2 == 0 for n in row) / max(1, len(row)) for row in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = remoe.RemoeConfig(
        **sizes, vocab_size=WORDS, num_experts=8, initializer_range=0.2, sparsity={"lambda_init": 1e-3},
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=8, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, seed=0,
        )  # fmt: skip
        prompts = datasets.Dataset.from_list([{"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(2, 34)])
        trainer = ReplayingGRPOTrainer(
            remoe.RemoeForCausalLM(config), reward, settings, prompts, processing_class=tokenizer()
        )
        SparsityCallback.attach(trainer)
        trainer.train()
    for entry in trainer.state.log_history[: args.steps]:
        differ, lam, sparsity = entry["pairs_that_differ"], entry["lambda"], entry["sparsity"]
        print(f"step {entry['step']}  pairs that differ {differ:.2%}  lambda {lam:.2e}  sparsity {sparsity:.3f}")


if __name__ == "__main__":
    main()
