"""What the README prints must work as printed."""

import re
from pathlib import Path

from remoe.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_examples_run():
    examples = blocks("python")
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_two_commands_set_everything_up_and_ci_calls_the_second():
    setup = blocks("bash")
    assert len(setup) == 2
    assert "venv" in setup[0]
    assert setup[0].strip().endswith("remoe train")
    assert setup[1].strip() in (ROOT / ".ci" / "run").read_text()


def test_every_command_is_named():
    for name in COMMANDS:
        assert f"remoe {name}" in README
