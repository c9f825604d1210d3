"""With --mask-documents, the loss is that of each document alone, in training and in validation."""

import json

import pytest
import torch
from tiny_run import FLAGS

from remoe.lab.cli.main import main
from remoe.lab.data import ValidationWindows, open_dataset
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_run
from remoe.lab.training.trainer import Trainer
from remoe.lab.training.validate import evaluate, total

LENGTH = 1024  # tokens of a window, several documents


def trainer_of(corpus, tmp_path, mask):
    options = {"seq_len": LENGTH, "batch_size": 2, "micro_batch_size": 1, "device": "cpu", "mask_documents": mask}
    model = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
    return Trainer(
        config_from_dict({**options, "num_experts": 4, "model": model}, "test"),
        open_dataset(corpus),
        RunFolder(tmp_path),
    )


def documents(inputs, targets, eos):
    """Inputs and targets of each document of a row; the EOS token before a document is its first input."""
    starts = [0, *((inputs[1:] == eos).nonzero().flatten() + 1).tolist()]
    sizes = torch.tensor([*starts, len(inputs)]).diff().tolist()
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def nats_alone(trainer, rows):
    """Summed loss and number of the documents of rows of inputs and targets, of which each runs alone."""
    nats, count = 0.0, 0
    trainer.model.eval()
    with torch.no_grad():
        for inputs, targets in rows:
            for ids, labels in documents(inputs, targets, trainer.dataset.eos_token_id):
                out = trainer.model(ids[None], shift_labels=labels[None], num_items_in_batch=1, use_cache=False)
                nats, count = nats + out.lm_loss.item(), count + 1
    trainer.model.train()
    return nats, count


def test_the_loss_is_that_of_documents_alone(corpus, tmp_path):
    masked, plain = (trainer_of(corpus, tmp_path, mask) for mask in (True, False))
    token_BS = masked.batches.batch(0)
    assert torch.equal(token_BS, plain.batches.batch(0))
    nats, count = nats_alone(masked, [(row[:-1], row[1:]) for row in token_BS])
    assert count > 2 * 2
    alone = nats / (2 * LENGTH)
    assert masked._backward()[0].item() == pytest.approx(alone, rel=1e-5)
    assert abs(plain._backward()[0].item() - alone) > 1e-3 * alone
    gradients = [
        torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None]) for t in (masked, plain)
    ]
    assert (gradients[0] - gradients[1]).norm() > 1e-2 * gradients[1].norm()

    rows = [
        (inputs[mask], targets[mask])
        for domain in masked.windows.domains
        for batch in masked.windows.batches(domain, 1)
        for inputs, targets, mask in zip(*batch, strict=True)
    ]
    nats, count = nats_alone(masked, rows)
    assert count > len(rows)
    found = [total(trainer.validate(final=True)) for trainer in (masked, plain)]
    assert found[0].nats == pytest.approx(nats, rel=1e-5)
    assert found[0].targets == found[1].targets
    assert abs(found[1].nats - nats) > 1e-4 * nats


def test_a_run_and_its_evaluation_mask_alike(corpus, tmp_path, capsys):
    run = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--steps", "2", *FLAGS, "--seq-len", "256"]
    assert main(["train", *run, "--mask-documents"]) == 0
    assert ", documents masked from each other; device" in capsys.readouterr().out
    loss = json.loads((tmp_path / "run" / "summary.json").read_text())["validation_loss"]
    figures = tmp_path / "figures.json"
    assert main(["eval", str(tmp_path / "run"), "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["all"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert main(["eval", str(tmp_path / "run"), "--sweep-threshold", "0", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["points"][0]["loss"] == pytest.approx(loss, rel=1e-6)
    model, *_ = load_run(tmp_path / "run")
    plain = total(evaluate(model, ValidationWindows(open_dataset(corpus).validation, 256), batch_size=4)).loss
    assert plain != pytest.approx(loss, rel=1e-5)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--no-mask-documents"]) == 2
    assert "with --mask-documents False: it was started with True" in capsys.readouterr().err


def test_a_router_that_merges_segments_is_refused_before_anything_is_written(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        main(["train", "--data", str(corpus), "--out", str(out), *FLAGS, "--router", "lory", "--mask-documents"]) == 2
    )
    assert "--mask-documents: segments of router 'lory' would mix documents" in capsys.readouterr().err
    assert not out.exists()
