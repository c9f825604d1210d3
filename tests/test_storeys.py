"""The storeys of the package: method, models, laboratory; `python tests/storeys.py` prints them."""

import pytest
import storeys

FRONT_DOOR = '_HOME = {"Model": "models"}\n'


def package(folder, **files):
    """A package `remoe` of these modules: `lab_cli` stands for lab/cli.py, and `_` for the front door."""
    for name, text in {"_": FRONT_DOOR, "layer": "", "models": "", "lab_cli": "", **files}.items():
        path = folder / "remoe" / ("__init__.py" if name == "_" else f"{name.replace('_', '/')}.py")
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return storeys.Package(folder)


@pytest.fixture(scope="module")
def ours():
    return storeys.Package()


def test_no_storey_imports_a_higher_one(ours):
    assert ours.upward() == []


def test_no_modules_import_each_other_in_a_circle(ours):
    assert ours.circles() == []


def test_every_storey_imports_only_what_its_installation_brings(ours):
    assert ours.foreign() == []


def test_every_file_belongs_to_a_storey(ours):
    assert ours.strays() == []
    assert {ours.storey(name) for name in ours.modules} == set(storeys.STOREYS)


@pytest.mark.parametrize(
    "line",
    [
        "import remoe.lab.cli",
        "from remoe.lab import cli",
        "from .lab.cli import main",
        "def f():\n    from remoe.models import Model",
        "if TYPE_CHECKING:\n    from remoe import Model",
        "import remoe\nremoe.Model()",
        'import_module("remoe.lab.cli")',
        'NAME = "remoe.lab.cli"\nimportlib.import_module(NAME)',
        'import_module(f"remoe.lab.{name}")',
    ],
)
def test_finds_an_import_upward(tmp_path, line):
    (found,) = package(tmp_path, layer=line).upward()
    assert found.startswith("remoe.layer:")
    assert package(tmp_path, layer="", lab_other=line).upward() == []


def test_the_front_door_may_name_higher_modules_in_strings_only(tmp_path):
    assert package(tmp_path, _='import_module("remoe.lab.cli")').upward() == []
    assert len(package(tmp_path, _="from remoe.lab import cli").upward()) == 1


def test_finds_circles_packages_and_strays(tmp_path):
    wrong = package(
        tmp_path, layer="import remoe.errors", errors="def f():\n    from .layer import x\n    import yaml", new=""
    )
    assert wrong.circles() == ["remoe.errors <-> remoe.layer"]
    assert wrong.foreign() == ["remoe.errors:3 imports yaml"]
    assert wrong.strays() == ["remoe.new belongs to no storey"]


def test_the_command_prints_the_storeys_and_fails_on_a_violation(tmp_path, capsys, monkeypatch):
    package(tmp_path)
    monkeypatch.setattr(storeys, "SOURCE", tmp_path)
    assert storeys.main() == 0
    printed = capsys.readouterr().out
    assert "imports upward: 0" in printed
    assert "circles: 0" in printed
    package(tmp_path, layer="import remoe.lab.cli")
    assert storeys.main() == 1
    assert "remoe.layer:1 (method) imports remoe.lab.cli (lab)" in capsys.readouterr().out
