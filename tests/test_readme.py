"""What the README and the guide print must work as printed."""

import re
from pathlib import Path

import pytest
import yaml

from remoe import routing
from remoe.lab.cli.main import COMMANDS
from remoe.lab.compare.experiment import experiment_from_dict

ROOT = Path(__file__).parents[1]
README, GUIDE = ((ROOT / name).read_text() for name in ("README.md", "docs/guide.md"))


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "guide"])
def test_python_examples_run(text):
    before = dict(routing.ROUTERS)
    examples = blocks("python", text)
    assert examples
    for example in examples:
        exec(compile(example, "example", "exec"), {})
    routing.ROUTERS.clear()
    routing.ROUTERS.update(before)


def test_the_experiment_in_the_guide_loads():
    (example,) = blocks("yaml", GUIDE)
    mine = experiment_from_dict(yaml.safe_load(example), "x", "x.yaml")
    assert len(mine.runs) == 4 * (3 + 1 + 3)  # points, and the seeds of each variant


def test_the_guide_names_every_option_of_every_router():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", GUIDE.split("## Options of routers")[1], flags=re.MULTILINE))
    named = {name: set(re.findall(r"`(\w+)`", row)) for name, row in rows.items()}
    named["relu_scaled"] |= named["relu"]  # "and those of `relu`"
    for name, router in routing.ROUTERS.items():
        assert named.get(name, set()) - {"relu"} == set(routing.router_options(router))


def test_two_commands_set_everything_up_and_ci_calls_the_second():
    setup = blocks("bash")
    assert len(setup) == 2
    assert "venv" in setup[0]
    assert setup[0].strip().endswith("remoe train")
    assert setup[1].strip() in (ROOT / ".ci" / "run").read_text()


def test_every_command_is_named():
    for name in COMMANDS:
        assert f"remoe {name}" in README
