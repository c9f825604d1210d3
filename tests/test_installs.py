"""The installs: what each brings, and what a user without an extra is told, in virtual environments of their own.

An environment holds the wheel, and links to the distributions that the wheel's metadata asks for and all that these
need, taken from the environment of the tests. No other package can be imported there.
"""

import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

TRAIN_EVERY_ROUTER = """
import torch, remoe
from remoe.routing import ROUTERS

for name in ROUTERS:
    torch.manual_seed(0)
    layer = remoe.MoE(d_model=16, d_ffn=32, num_experts=4, k=1, router=name, init_std=0.2)
    control = remoe.SparsityController.of([layer])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x, target, ids = torch.randn(4, 32, 16), torch.randn(4, 32, 16), torch.randint(100, (4, 32))
    losses = []
    for step in range(10):
        y, routing = layer(x, token_ids=ids)
        task = (y - target).square().mean()
        loss = task + control.loss_terms([routing]).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        control.observe([routing])
        control.update()
        losses.append(task.item())
    assert losses[-1] < losses[0], (name, losses)
    print(name)
"""

TRAIN_A_MODEL = """
import torch, remoe

config = remoe.RemoeConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=1,
)
model = remoe.RemoeForCausalLM(config)
ids = torch.randint(50, (2, 12))
model(input_ids=ids, labels=ids).loss.backward()
model.update_routing()
print(model.generate(ids[:, :3], max_new_tokens=2, do_sample=False).shape[1])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist of this source tree."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(out)], cwd=ROOT, check=True)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def requirements(wheel: Path, extra: str = "") -> set[str]:
    """Names of the packages that installing the wheel asks for, with this extra or without any."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    asked = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return {each.name for each in asked if each.marker is None or each.marker.evaluate({"extra": extra})}


def closure(names: set[str]) -> set[str]:
    """These distributions and all that they need themselves, as far as they are installed here."""
    found: set[str] = set()
    todo = set(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        try:
            needs = [Requirement(text) for text in distribution(name).requires or []]
        except PackageNotFoundError:  # the need of an optional feature that is not installed
            continue
        found.add(name)
        todo |= {need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})}
    return found


def environment(folder: Path, wheel: Path, names: set[str]) -> Path:
    """A virtual environment with the wheel and links to these distributions; returns its folder of programs."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in closure(names):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(distribution(name).locate_file(top)))
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    return programs


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd="/")


@pytest.fixture(scope="module")
def plain(built, tmp_path_factory) -> Path:
    """Programs of an environment as `pip install remoe` makes it."""
    return environment(tmp_path_factory.mktemp("plain") / "venv", built["wheel"], requirements(built["wheel"]))


def test_the_wheel_asks_for_torch_alone(built):
    assert requirements(built["wheel"]) == {"torch"}
    models = requirements(built["wheel"], "models")
    assert models == {"torch", "transformers", "safetensors"}


def test_the_distributions_hold_the_sources_and_no_results(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        wheel = archive.namelist()
    with tarfile.open(built["sdist"]) as archive:
        sdist = [name.split("/", 1)[-1] for name in archive.getnames()]
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name and ".egg-info" not in name}
    assert {name for name in wheel if ".dist-info/" not in name} == sources
    assert {f"src/{name}" for name in sources} <= set(sdist)
    assert {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "pyproject.toml"} <= set(sdist)
    assert not [name for name in sdist if "results/" in name or name.endswith(".png")]
    assert built["sdist"].stat().st_size < 1_000_000


def test_torch_alone_trains_every_router(plain):
    for absent in ("numpy", "transformers", "yaml", "pytest"):
        assert "ModuleNotFoundError" in run(plain / "python", "-c", f"import {absent}").stderr
    trained = run(plain / "python", "-c", TRAIN_EVERY_ROUTER)
    assert trained.returncode == 0, trained.stderr
    from remoe.routing import ROUTERS

    assert trained.stdout.split() == list(ROUTERS)


@pytest.mark.parametrize(
    "name", ["RemoeConfig", "RemoeForCausalLM", "SparsityCallback", "relufy", "upcycle", "quantize"]
)
def test_a_name_of_the_models_says_which_extra_installs_it(plain, name):
    failed = run(plain / "python", "-c", f"import remoe\ntry: remoe.{name}\nexcept ImportError as e: print(e)")
    assert failed.returncode == 0, failed.stderr
    (line,) = failed.stdout.splitlines()
    assert f"remoe.{name}" in line
    assert "pip install 'remoe[models]'" in line


@pytest.mark.parametrize("command", ["train", "plan 182m", "data check x", "convert upcycle a b"])
@pytest.mark.parametrize("program", [["remoe"], ["python", "-m", "remoe"]], ids=" ".join)
def test_the_command_says_which_extra_installs_it(plain, program, command):
    failed = run(plain / program[0], *program[1:], *command.split())
    assert failed.returncode == 2
    assert failed.stdout == ""
    (line,) = failed.stderr.splitlines()
    assert "pip install 'remoe[lab]'" in line


def test_the_extra_for_models_trains_and_generates(built, tmp_path):
    programs = environment(tmp_path / "venv", built["wheel"], requirements(built["wheel"], "models"))
    trained = run(programs / "python", "-c", TRAIN_A_MODEL)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.split() == ["5"]
    for absent in ("pyarrow", "matplotlib", "tyro"):
        assert "ModuleNotFoundError" in run(programs / "python", "-c", f"import {absent}").stderr
