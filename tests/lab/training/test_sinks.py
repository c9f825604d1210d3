"""Where records go beside metrics.jsonl: load of the experts in TensorBoard, and trackers."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import FLAGS

from remoe.lab.cli.main import main
from remoe.lab.training.metrics import MetricsWriter
from remoe.lab.training.sinks import CELL, load_image

LOAD = [[0.0, 0.25, 0.5], [1.0, 0.0, 0.25]]
RECORDS = [
    {"step": 1, "lm_loss": 2.0, "stage": "dense", "load_per_expert": LOAD},
    {"step": 2, "lm_loss": 1.0, "load_per_expert": LOAD, "validation_loss": {"all": 1.5}},
]


class Fake(ModuleType):
    """A tracker that keeps what it was called with."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, **arguments):
        self.calls.append(("init", arguments))

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))

    @staticmethod
    def Histogram(values):
        return ["histogram", *values]


def test_tensorboard_shows_the_load_where_it_is_validated(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=1)
    for record in RECORDS:
        writer.write(record)
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("lm_loss")] == [2.0, 1.0]
    (image,) = board.Images("load_per_expert")
    assert (image.step, image.height, image.width) == (2, 2 * CELL, 3 * CELL)
    (histogram,) = board.Histograms("load_per_expert/1")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (2, 3, 1.0)


def test_the_image_is_the_root_of_the_load_up_to_four_times_the_mean():
    image = load_image(np.array([[0.0, 0.25, 0.5], [0.125, 0.0, 0.125]]))  # mean 1/6
    highest = 4 / 6
    shades = np.round(255 * np.sqrt(np.array([[0.0, 0.25, 0.5], [0.125, 0.0, 0.125]]) / highest))
    assert image[::CELL, ::CELL].tolist() == shades.tolist()
    assert load_image(np.zeros((1, 2))).max() == 0


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_record(tmp_path, monkeypatch, name):
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    for _ in range(2):  # a resumed run is the same one there
        writer = MetricsWriter(tmp_path, 1, [name], {"seed": 3})
        for record in RECORDS:
            writer.write(record)
        writer.close()
    (_, first), *logged, last = fake.calls[:4]
    assert first["name"] == tmp_path.name
    assert first["config"] == {"seed": 3}
    assert first["resume"] == "allow"
    assert fake.calls[4] == ("init", first)
    histograms = {f"load_per_expert/{layer}": ["histogram", *load_E] for layer, load_E in enumerate(LOAD)}
    assert logged == [
        ("log", 1, {"lm_loss": 2.0}),
        ("log", 2, {"lm_loss": 1.0, "validation_loss/all": 1.5, **histograms}),
    ]
    assert last == ("finish",)


def test_a_tracker_that_does_not_start_is_one_line(corpus, tmp_path, monkeypatch, capsys):
    fake = Fake("wandb")
    fake.init = lambda **_: (_ for _ in ()).throw(RuntimeError("no API key\nconfigured"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    argv = ["train", "--data", str(corpus), "--steps", "1", "--log", "wandb", "--out", str(tmp_path / "run"), *FLAGS]
    assert main(argv) == 2
    assert "error: --log wandb: no API key configured\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandb", "--log wandb needs wandb: pip install 'remoe[wandb]'"), ("paper", "unknown --log 'paper'")],
)
def test_a_tracker_that_is_not_there_is_one_line_before_any_work(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", "--steps", "1", "--log", name]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_tracker_takes_the_records_offline(tmp_path, name):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    script = (
        "import sys, pathlib; from remoe.lab.training.metrics import MetricsWriter\n"
        f"w = MetricsWriter(pathlib.Path(sys.argv[1]), 1, [{name!r}], {{'seed': 3}})\n"
        f"[w.write(r) for r in {RECORDS!r}]\nw.close()"
    )
    places = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=os.environ | places, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = [*tmp_path.glob("wandb/offline-run-*/*.wandb" if name == "wandb" else "trackio/*.db")]
    assert written
    assert written[0].stat().st_size > 0
