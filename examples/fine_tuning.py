"""What the examples share: windows of prepared data, fine-tuning by transformers' Trainer, validation loss."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from remoe.lab.data.batches import TrainBatches, ValidationWindows


class Windows(torch.utils.data.Dataset):
    """Training windows in the order of their seed."""

    def __init__(self, batches: TrainBatches, count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.batches.batch(index)[0, :-1]
        return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def validation_loss(model: PreTrainedModel, windows: ValidationWindows, tokens_per_domain: int) -> float:
    """Nats per token."""
    model.eval()
    nats = count = 0.0
    for domain in windows.domains:
        left = tokens_per_domain
        for inputs, targets, _ in windows.batches(domain, 4):
            inputs, targets = inputs.to(model.device), targets.to(model.device)
            logits = model(input_ids=inputs, use_cache=False).logits.float()
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += (targets != -100).sum().item()
            left -= inputs.numel()
            if left <= 0:
                break
    return nats / count


def fine_tune(
    model: PreTrainedModel,
    train: Windows,
    out: Path,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    callbacks: list[TrainerCallback],
) -> list[dict]:
    """Trains every weight, cosine learning rate with a fifteenth of the steps as warm-up; returns the log."""
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 15,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(train)

    trainer = InOrder(model, arguments, train_dataset=train, callbacks=callbacks)
    trainer.train()
    return trainer.state.log_history
