"""Draws `active-experts-32.png` from the records of two runs: python docs/images/draw.py (in the project's folder)."""

from pathlib import Path

from remoe.lab.analysis.routing_figures import active_against_frequency
from remoe.lab.compare.record import RecordFolder

FOLDER = Path(__file__).parent
RECORDS = FOLDER.parents[1] / "experiments" / "results" / "records"
RUNS = {
    "ReLU routing, E = 32, k = 1": "mini-relu-num_experts32-sign-seed0-013546e9",
    "TopK routing, E = 32, k = 1": "mini-topk-num_experts32-seed0-fda06995",
}

routings = {title: RecordFolder(RECORDS).load(name).routing for title, name in RUNS.items()}
figure = active_against_frequency({title: (one.count_U, one.active_U) for title, one in routings.items()})
figure.savefig(FOLDER / "active-experts-32.png", metadata={"Software": None})
