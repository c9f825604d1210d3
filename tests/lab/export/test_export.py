"""An exported run loads, computes, generates and trains where this package is not, and its card says what it is."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_run import FLAGS
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import remoe
from remoe.lab.cli.main import main
from remoe.lab.export import export_model
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.load import load_run
from remoe.models.bundle import PACKAGE, flat_name, relocated, write_bundle

WITHOUT_REMOE = """
import sys
class Blocked:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "remoe":
            raise ImportError("No module named remoe")
sys.meta_path.insert(0, Blocked())
import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
ids, folders = torch.load(sys.argv[1]), sys.argv[3:]
results = []
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
        written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.train()
    model(ids, labels=ids).loss.backward()
    model.update_routing()
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, pad_token_id=0)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    results.append({"logits": logits, "written": written, "lam": model.sparsity.lam, "names": [
        type(model).__name__, type(classifier).__name__, type(base).__name__, type(again).__name__]})
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def exported(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    run, out = folder / "run", folder / "My model"
    flags = ["--steps", "6", "--validate.every", "6", "--out", str(run)]
    assert main(["train", "--data", str(corpus), *FLAGS, *flags]) == 0
    assert main(["export", str(run), str(out), "--license", "apache-2.0"]) == 0
    return run, out


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Code of folders is loaded as in a new process, from a cache of the test's own, and forgotten afterwards."""

    def forget():
        names = [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
        return {name: sys.modules.pop(name) for name in names}

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = forget()
    yield
    forget()
    sys.modules.update(before)


def load_without_remoe(folders, tmp_path):
    """Token ids, and what a process without this package computes from them with the model of each folder."""
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    arguments = ["-c", *map(str, (tmp_path / "ids.pt", tmp_path / "results.pt", *folders))]
    begin = f"""import os, sys
os.environ["HF_MODULES_CACHE"] = {str(tmp_path / "modules")!r}
sys.argv = {arguments!r}
"""
    status, _, errors = fresh.run(begin + WITHOUT_REMOE)
    assert status == 0, errors[-2000:]
    return ids, torch.load(tmp_path / "results.pt")


@pytest.mark.slow
def test_loads_without_this_package(exported, tmp_path):
    _, folder = exported
    ids, (result,) = load_without_remoe([folder], tmp_path)
    model = remoe.RemoeForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], model(ids).logits, rtol=1e-4, atol=1e-5)
    written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(result["written"], written)
    assert result["lam"] != model.sparsity.lam
    causal = "RemoeForCausalLM"
    assert result["names"] == [causal, "RemoeForSequenceClassification", "RemoeModel", causal]
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("def").input_ids


@pytest.mark.slow
def test_a_capped_export_loads_without_this_package(exported, tmp_path, capsys):
    run, _ = exported
    assert main(["export", str(run), str(tmp_path / "capped"), "--max-experts", "1"]) == 0
    assert f"remoe train --from {tmp_path / 'capped'} --data DATA\n" in capsys.readouterr().out
    ids, (result,) = load_without_remoe([tmp_path / "capped"], tmp_path)
    ours = load_run(run)[0].eval()
    with torch.no_grad():
        free = ours(ids).logits
        ours.set_max_experts(1)
        expected = ours(ids).logits
    assert (expected - free).abs().max() > 1e-3  # the cap matters
    torch.testing.assert_close(result["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_model_fine_tuned_from_the_folder_keeps_its_code(exported, tmp_path):
    _, folder = exported
    model = remoe.RemoeForCausalLM.from_pretrained(folder).train()
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    assert {p.name for p in (tmp_path / "tuned").glob("*.py")} == {p.name for p in folder.glob("*.py")}
    ids, (result,) = load_without_remoe([tmp_path / "tuned"], tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    remoe.RemoeForSequenceClassification.from_pretrained(folder, num_labels=2).save_pretrained(tmp_path / "classes")
    assert (tmp_path / "classes" / "classification_remoe.py").is_file()


def test_a_model_without_code_is_written_without(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_experts": 4}
    remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes)).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.slow
@pytest.mark.usefixtures("own_modules")
def test_two_folders_in_one_process_do_not_touch_each_other(exported, tmp_path):
    _, folder = exported
    shutil.copytree(folder, tmp_path / "modèle-2")
    name = "modeling_remoe.RemoeForCausalLM"
    classes = [get_class_from_dynamic_module(name, str(place)) for place in (folder, tmp_path / "modèle-2")]
    assert len({remoe.RemoeForCausalLM, *classes}) == 3  # the exported code, twice
    config = RunFolder(exported[0]).last_checkpoint()
    models = [cls(cls.config_class.from_pretrained(config)).train() for cls in classes]
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = [model(ids, labels=ids).loss for model in (models[0], models[1], models[0])]
    for loss in losses:
        loss.backward()
    assert len({loss.item() for loss in losses}) == 1


@pytest.mark.slow
def test_eval_and_generate_take_the_folder(exported, tmp_path, capsys):
    run, folder = exported
    data = RunFolder(run).load_config().data
    figures = []
    for arguments in ([run], [folder, "--data", data]):
        assert main(["eval", *map(str, arguments), "--json", str(tmp_path / "figures.json")]) == 0
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    assert [figure.pop("checkpoint") for figure in figures] == [str(run / "checkpoints/step-00000006"), str(folder)]
    assert figures[0] == figures[1]
    capsys.readouterr()
    for place in (run, folder):
        assert main(["generate", str(place), "--prompt", "def ", "--max-new-tokens", "9"]) == 0
    written = capsys.readouterr().out
    assert written[: len(written) // 2] == written[len(written) // 2 :]
    assert main(["eval", str(folder)]) == 2
    assert "name a folder with --data" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_leaves_models_of_others_to_tasks(exported, tmp_path, capsys):
    run, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    assert main(["generate", str(tmp_path / "llama"), "--prompt", "def ", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert main(["eval", str(tmp_path / "llama"), "--data", str(RunFolder(run).load_config().data)]) == 2
    assert "is a LlamaForCausalLM, not a model of this package" in capsys.readouterr().err


@pytest.mark.slow
def test_other_routers_load_without_this_package(tmp_path):
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    models = {}
    for router in ("topk", "dense", "lory", "hash"):
        torch.manual_seed(0)
        config = remoe.RemoeConfig(**sizes, router=router, experts_backend="naive")
        models[tmp_path / router] = model = remoe.RemoeForCausalLM(config).eval()
        (tmp_path / router).mkdir()
        export_model(model, tmp_path / router)
    ids, results = load_without_remoe(models, tmp_path)
    for model, result in zip(models.values(), results, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(result["logits"], model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_code_names_nothing_of_this_package(exported):
    _, folder = exported
    for path in folder.glob("*.py"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if line.lstrip().startswith(("from remoe", "import remoe"))], path.name


@pytest.mark.slow
def test_code_imports_only_what_transformers_brings(exported):
    """transformers refuses to load a folder of the hub whose modules, any of them, import what is not installed."""
    _, folder = exported
    for path in folder.glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        absolute = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
        absolute += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        needed = {name.split(".")[0] for name in absolute} - sys.stdlib_module_names
        assert needed <= {"torch", "transformers", "huggingface_hub"}, path.name


def test_only_the_names_of_imported_modules_change():
    source = """'''Says `from remoe.layer import MoE`, naïvely.'''

import remoedex
from remoe.models.modeling_remoe import RemoeModel  # ends a line
from remoe.routing import (
    ROUTERS,
)


def late():
    "né"; from remoe.experts.cpu.backend import forward as first

    return "from remoe.layer import MoE", first, remoedex, ROUTERS, RemoeModel
"""
    changed = relocated(source.encode()).decode()
    expected = source.replace("from remoe.models.modeling_remoe", "from .modeling_remoe")
    expected = expected.replace("from remoe.routing", "from .remoe_routing")
    assert changed == expected.replace("from remoe.experts.cpu.backend", "from .remoe_experts_cpu_backend")
    assert changed.count("from remoe.layer import MoE") == 2


def test_folder_has_our_sources_but_for_the_names_in_imports(tmp_path):
    names = set(write_bundle(tmp_path))
    assert names == {path.stem for path in tmp_path.iterdir()}
    for path in PACKAGE.rglob("*.py"):
        parts = ("remoe", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = flat_name(".".join(parts).removesuffix(".__init__"))
        if name in names:
            names.remove(name)
            pairs = zip(path.read_text().split("\n"), (tmp_path / f"{name}.py").read_text().split("\n"), strict=True)
            changed = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
            assert all(a.lstrip().startswith("from remoe.") and b.lstrip().startswith("from .") for a, b in changed)
    assert not names
    assert not [path for path in tmp_path.iterdir() if "_lab_" in path.name or "convert" in path.name]


@pytest.mark.parametrize(
    "line",
    [
        "import remoe.layer",
        "from remoe.experts import naive",
        "from .layer import MoE",
        "from  remoe.layer import MoE",
    ],
)
def test_imports_that_the_folder_cannot_have_are_refused(line):
    with pytest.raises(ValueError, match="line 1: "):
        relocated(line.encode())


@pytest.mark.slow
@pytest.mark.usefixtures("own_modules")
def test_folder_has_the_backends_that_need_torch_alone(exported):
    _, folder = exported
    cls = get_class_from_dynamic_module("modeling_remoe.RemoeForCausalLM", str(folder))
    package = cls.__module__.rpartition(".")[0]
    names = ("remoe_experts_dispatch", "remoe_routing_pairs", "remoe_models_loss")
    dispatch, pairs, loss = (sys.modules[f"{package}.{name}"] for name in names)
    assert list(dispatch.BACKENDS) == ["naive", "cpu"]
    assert dispatch.check_backend("loop") == "cpu"
    assert not pairs.AVAILABLE
    operators = (dispatch.OPERATORS["cpu"].forward, dispatch.TRACED.backward, pairs._list_pairs, loss._forward)
    assert not any(operator._qualname.startswith("remoe::") for operator in operators)


def test_no_source_names_its_operators_in_another_way():
    """A literal name would be registered again by each exported folder, over that of the package."""
    sources = [path.read_text() for path in (Path(remoe.__file__).parent).rglob("*.py")]
    assert sum("custom_op(" in source for source in sources) >= 3
    assert not any(re.search(r'custom_op\(\s*"', source) for source in sources)


@pytest.mark.slow
def test_card_says_what_the_model_is(exported):
    run, folder = exported
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    for text in (
        "# My model",
        "6 of 6",
        "validation loss",
        "| sparsity, target |",
        "| farm |",
    ):
        assert text in card
    assert str(run.parent) not in card.replace(str(folder), "")
    header = ModelCard(card).data
    assert (header.license, header.model_name) == ("apache-2.0", "My model")
    whole = RunFolder(run).load_summary()["validation"]["all"]
    found = {r.metric_type: r.metric_value for r in header.eval_results if r.dataset_config == "all"}
    assert found == {name: whole[name] for name in ("loss", "perplexity", "bits_per_byte")}
    for plot in ("routing.png", "training-loss.png", "training-course.png"):
        assert f"]({plot})" in card
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_unfinished_run_has_a_card_without_results(corpus, tmp_path):
    run = tmp_path / "run"
    flags = ["--steps", "4", "--validate.every", "4", "--checkpoint.every", "2", "--out", str(run)]
    assert main(["train", "--data", str(corpus), *FLAGS, *flags]) == 0
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics[: len(metrics) - 40])  # killed while it wrote the last record
    assert main(["export", str(run / "checkpoints" / "step-00000002"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 of 4" in card
    assert "not the last of its run" in card


@pytest.mark.slow
def test_full_folder_and_missing_run_are_refused(exported, tmp_path, capsys):
    run, folder = exported
    assert main(["export", str(run), str(folder)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2


@pytest.mark.slow
def test_lm_eval_harness_reads_the_folder(exported, tmp_path, monkeypatch):
    """The harness's own program, in a process where this package cannot be imported."""
    pytest.importorskip("lm_eval")
    _, folder = exported
    link = tmp_path / "model"  # the harness splits its arguments at commas and spaces
    link.symlink_to(folder)
    rows = [{"text": "def f(x):", "choices": [" return x", " banana"], "gold": 0}] * 3
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    program = f"""{WITHOUT_REMOE.split("import torch")[0]}
import functools
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
# To read the thousands of tasks that come with it would take longer than all the rest.
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
cli_evaluate()
"""
    arguments = ["--model", "hf", "--model_args", f"pretrained={link},trust_remote_code=True", "--device", "cpu"]
    arguments += ["--tasks", "tiny", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())
    assert results["n-samples"]["tiny"]["effective"] == 3
    assert results["results"]["tiny"]["acc,none"] in (0.0, 1.0)
