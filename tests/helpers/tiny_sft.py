"""A small model and its data for TRL's trainers. Needs trl and datasets."""

import torch
import trl
from tiny_models import VOCAB, token_ids

import remoe

STEPS, BATCH = 4, 4
SETTINGS = {
    "per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0, "bf16": False,
    "gradient_checkpointing": False, "remove_unused_columns": False,
}  # fmt: skip


def remoe_model(router):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = remoe.RemoeConfig(
        **sizes, vocab_size=VOCAB, num_experts=4, router=router, sparsity={"lambda_init": 1e-2}, initializer_range=0.3
    )
    return remoe.RemoeForCausalLM(config)


def rows():
    ids = token_ids(STEPS * BATCH, 12)
    return [{"input_ids": row[: 12 - i % 4].tolist()} for i, row in enumerate(ids)]


def collate(examples):
    width = max(len(example["input_ids"]) for example in examples)
    pad = [width - len(example["input_ids"]) for example in examples]
    ids = torch.tensor([e["input_ids"] + [0] * n for e, n in zip(examples, pad, strict=True)])
    mask = torch.tensor([[1] * (width - n) + [0] * n for n in pad])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def arguments(folder, **options):
    settings = SETTINGS | {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}} | options
    return trl.SFTConfig(output_dir=str(folder), **settings)


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token="<pad>", eos_token="</s>"
    )
