"""A small model in transformers' Trainer. Needs accelerate."""

import torch
from transformers import Trainer, TrainingArguments

import remoe

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 32,
    "sparsity": {"lambda_init": 1e-3},
}
STEPS = 4
BATCH = 4


def tiny(**options):
    torch.manual_seed(0)
    return remoe.RemoeForCausalLM(remoe.RemoeConfig(**{**TINY, **options})).train()


def rows(count=STEPS * BATCH, length=12):
    """Sequences of different length, padded at the right."""
    random = torch.Generator().manual_seed(1)
    examples = []
    for i in range(count):
        ids = torch.randint(1, 61, (length,), generator=random)
        mask = (torch.arange(length) < length - i % 5).long()
        examples.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return examples


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**{**settings, **options})


def train(model, folder, resume=None, callback=None, **options):
    callback = callback or remoe.SparsityCallback()
    trainer = Trainer(model, arguments(folder, **options), train_dataset=rows(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]
