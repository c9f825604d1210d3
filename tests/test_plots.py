"""`remoe.plots`: figures from runs, records and models; and the notebook that shows them."""

import ast
import json
import shutil
import socket
import struct
from pathlib import Path

import pytest
import torch

import remoe
from remoe import plots
from remoe.errors import CheckpointError, ConfigError
from remoe.lab.analysis.record import RoutingRecord
from remoe.lab.training.config import TrainConfig
from remoe.lab.training.yaml_files import to_yaml

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs with the same name, of four steps."""
    places = [tmp_path / "a" / "mine", tmp_path / "b" / "mine"]
    for place, router in zip(places, ("relu", "topk"), strict=True):
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(to_yaml(TrainConfig(router=router, num_experts=4).to_dict()))
        records = [
            {
                "step": step,
                "lm_loss": 5.0 - step,
                "reg_loss": 1.0,
                "lambda": 1e-3 * step,
                "sparsity": 0.5 + 0.05 * step,
                "stage": "dense",
                "sparsity_per_layer": [0.6, 0.7],
                "load_per_expert": [[0.1 * step, 0.2, 0.3, 0.4], [0.25] * 4],
            }
            for step in range(1, 5)
        ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return places


def record(active_LTE):
    T = active_LTE.shape[1]
    return RoutingRecord.of(
        active_LTE, torch.zeros(T, dtype=torch.int64), torch.arange(T) % 2, torch.zeros(T), ["a", "b"]
    )


def lines(ax):
    return [pytest.approx([*line.get_ydata()]) for line in ax.get_lines()]


def test_training_of_runs_is_what_their_metrics_say(runs):
    fig = plots.training(*runs)
    assert lines(fig.axes[0])[:2] == [[0.55, 0.6, 0.65, 0.7]] * 2
    assert [text.get_text() for text in fig.legends[0].get_texts()] == [
        "mine",
        "mine (2)",
        "sparse stage begins",
        "target 0.75",
    ]
    assert lines(plots.losses(runs[0]).axes[0]) == [[4.0, 3.0, 2.0, 1.0]] * 2  # faint records, and their mean
    (image,) = plots.load(runs[0]).axes[0].get_images()
    assert image.get_array()[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_experts_of_a_record_and_of_what_was_measured():
    active_LTE = torch.zeros(1, 40, 3, dtype=torch.bool)
    active_LTE[0, :10, 0] = active_LTE[0, ::2, 2] = True
    seen = plots.routing(record(active_LTE), name="mine")
    fig = plots.experts(seen, record(active_LTE))
    assert fig.axes[0].get_images()[0].get_array().tolist() == [[0.25, 0.0, 0.5]]
    assert [ax.get_title(loc="left") for ax in fig.axes[:3:2]] == ["mine", "record"]
    assert seen.summary.share_CLE == [[[0.25, 0.0, 1.0]], [[0.25, 0.0, 0.0]]]
    assert plots.domains(seen).subfigs
    assert plots.frequency(seen).axes


def test_a_model_in_memory_is_measured_on_tokens():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4}
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, num_key_value_heads=2, router="topk")).eval()
    token_NS = torch.randint(50, (3, 20))
    share_LE = torch.tensor(plots.routing(model, tokens=token_NS).summary.share_LE)
    counted_LE = torch.stack([one.assignment.count_E for one in model(token_NS).routings]) / token_NS.numel()
    assert torch.allclose(share_LE, counted_LE, atol=1e-4)


def test_a_figure_shows_itself_in_a_notebook_without_pyplot(runs):
    png = plots.losses(runs[0])._repr_png_()
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG")
    assert width > 2 * height > 400


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: plots.training(), "at least one run"),
        (lambda run: plots.experts(), "at least one source"),
        (lambda run: plots.flips(run), "no records of flip_rate"),
        (lambda run: plots.routing(run, tokens=torch.zeros(1, 1)), "model in memory"),
        (lambda run: plots.routing(record(torch.ones(1, 8, 2) > 0), prompt="x"), "do not go with"),
        (lambda run: plots.frequency(record(torch.ones(1, 8, 2) > 0)), "ten times"),
    ],
)
def test_mistakes_are_one_line(runs, call, message):
    with pytest.raises(ConfigError, match=message):
        call(runs[0])


def test_a_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(CheckpointError, match="not a run"):
        plots.losses(tmp_path)


def test_the_front_door_has_the_module():
    assert remoe.plots is plots
    assert "plots" in dir(remoe)
    assert "plots" not in remoe.__all__  # a star import would draw in matplotlib


def test_public_functions_are_listed():
    assert {name for name in plots.__all__ if name != "Measured"} == {
        name
        for name, value in vars(plots).items()
        if callable(value) and getattr(value, "__module__", "") == plots.__name__ and name.islower() and name[0] != "_"
    }


@pytest.mark.slow
def test_the_tour_runs_without_a_network_and_shows_figures(monkeypatch, capsys):
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    cells = [cell.replace("--steps 300", "--steps 12") for cell in cells]  # 300 show the three stages
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the notebook asked for the network"))
    namespace, shown = {"__name__": "__main__"}, []
    try:
        for cell in cells:
            body = ast.parse(cell).body
            last = body.pop() if isinstance(body[-1], ast.Expr) and not cell.endswith(";") else None
            exec(compile(ast.Module(body, []), "tour.ipynb", "exec"), namespace)
            if last is not None:
                shown.append(eval(compile(ast.Expression(last.value), "tour.ipynb", "eval"), namespace))
        folder = namespace["folder"]
        assert (folder / "run" / "report.html").stat().st_size > 100_000
    finally:
        shutil.rmtree(namespace.get("folder", ""), ignore_errors=True)
    assert [figure._repr_png_()[:4] for figure in shown if figure is not None] == [b"\x89PNG"] * 4
    printed = capsys.readouterr().out
    assert "finished: 12 steps" in printed
    assert "2 routers of 4 experts, TopK with k = 2, now ReLU" in printed
