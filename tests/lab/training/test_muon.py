"""`--optim.name muon`: torch's own Muon for a matrix, per expert for a stack; which parameters it takes; resume."""

import shutil

import pytest
import torch
from tiny_run import FLAGS
from whole_run import same_run

import remoe
from remoe.lab.cli.main import main
from remoe.lab.training.checkpoint import list_checkpoints
from remoe.lab.training.config import OptimOptions
from remoe.lab.training.muon import Muon, hidden_matrices, orthogonalised
from remoe.lab.training.optimizer import build_optimizer


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=["wide", "tall"])
def test_stacks_move_as_torch_moves_each_of_their_matrices(shape):
    start, gradients = torch.randn(3, *shape), torch.randn(4, 3, *shape)
    stack = torch.nn.Parameter(start.clone())
    single = torch.nn.Parameter(start[1].clone())
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    options = {"lr": 0.02, "weight_decay": 0.1}
    ours = Muon([stack, single], [], **options)
    theirs = torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        stack.grad, single.grad = gradient.clone(), gradient[1].clone()
        for matrix, part in zip(matrices, gradient, strict=True):
            matrix.grad = part.clone()
        ours.step()
        theirs.step()
    moved = (torch.stack([matrix.detach() for matrix in matrices]) - start).abs().mean()
    for expert, matrix in enumerate(matrices):
        assert (stack[expert] - matrix).abs().max() < 0.05 * moved  # products in bfloat16
    assert (single - matrices[1]).abs().max() < 0.05 * moved
    momentum = torch.stack([theirs.state[matrix]["momentum_buffer"] for matrix in matrices])
    torch.testing.assert_close(ours.state[stack]["momentum_buffer"], momentum)


def test_singular_values_become_about_one():
    values = torch.linalg.svdvals(orthogonalised(torch.randn(2, 40, 12)).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_attention_and_experts_by_muon_the_rest_by_adamw():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 4}
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, shared_expert_size=8)).train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = {names[id(parameter)].removeprefix("model.layers.0.") for parameter in hidden_matrices(model)}
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    experts = {f"mlp.{part}.{name}_proj" for part in ("experts", "shared_expert") for name in ("gate_up", "down")}
    assert parts == attention | experts
    optimizer = build_optimizer(model, OptimOptions(name="muon", weight_decay=0.1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    undecayed = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert undecayed == {name for name in names.values() if "norm" in name}
    ids = torch.randint(64, (2, 12))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    for name, parameter in model.named_parameters():
        matrix = name.removeprefix("model.layers.0.") in parts
        assert optimizer.state[parameter].keys() == (
            {"momentum_buffer"} if matrix else {"step", "exp_avg", "exp_avg_sq"}
        )


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted(corpus, tmp_path):
    out, flags = tmp_path / "whole", ["--steps", "6", "--checkpoint.every", "3", *FLAGS]
    assert main(["train", "--data", str(corpus), "--out", str(out), "--optim.name", "muon", *flags]) == 0
    stopped = shutil.copytree(out, tmp_path / "stopped")
    shutil.rmtree(list_checkpoints(stopped / "checkpoints")[-1])
    assert main(["train", "--out", str(stopped), "--resume"]) == 0
    same_run(out, stopped)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optim.name", "sgd"], "unknown --optim.name 'sgd'; choose one of: adamw, muon"),
        (["--optim.name", "muon", "--mesh", "fsdp=2"], "--optim.name muon cannot be used with --mesh"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, flags, words):
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
