"""transformers' Auto classes, and the model that classifies."""

import pickle
import subprocess
import sys

import fresh
import pytest
import torch
from torch.nn import functional as F

import remoe

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}


# What is imported before an Auto class is used.
IMPORTS = [
    "import remoe, transformers",
    "import transformers, remoe",
    "import transformers.models.auto.configuration_auto, remoe",
    "import transformers.models.auto.modeling_auto, remoe",
    *(
        f"import remoe; from transformers import {name}"
        for name in (
            "AutoModel",
            "LlamaForCausalLM",
            "LlamaConfig, AutoModelForCausalLM",
            "ViTModel",
            "Trainer",
        )
    ),
    "from transformers import LlamaForCausalLM; import remoe",
    "import remoe; from transformers.models.llama import modeling_llama",
    "from remoe import RemoeConfig",
    "from remoe import RemoeForSequenceClassification; from transformers import MixtralForCausalLM",
    "import remoe.sparsity; from transformers import LlamaForCausalLM",
    "import remoe, importlib.util; importlib.util.find_spec('transformers.models.auto.configuration_auto')",
    "import remoe, importlib.util; importlib.util.find_spec('transformers.models.auto.modeling_auto')",
]
MODELS = ["RemoeForCausalLM", "RemoeModel", "RemoeForSequenceClassification"]


@pytest.mark.slow
@pytest.mark.parametrize("imports", IMPORTS)
def test_auto_classes_know_remoe_in_every_order_of_imports(imports):
    code = f"""{imports}
import pickle
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
config = AutoConfig.for_model("remoe", **{SIZES})
for cls in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
    print(type(cls.from_config(pickle.loads(pickle.dumps(config)))).__name__)
"""
    status, output, errors = fresh.run(code)
    assert (status, output.split()) == (0, MODELS), errors[-1000:]
    assert "remoe" not in errors  # no warning either


@pytest.mark.slow
def test_a_pickled_config_alone_brings_the_models(tmp_path):
    """As a worker process gets it."""
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(remoe.RemoeConfig(**SIZES)))
    code = f"""import pickle, pathlib
config = pickle.loads(pathlib.Path({str(tmp_path / "config.pkl")!r}).read_bytes())
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    status, output, errors = fresh.run(code)
    assert (status, output.split()) == (0, MODELS[:1]), errors[-1000:]


@pytest.mark.slow
def test_auto_classes_load_a_folder(tmp_path):
    remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES)).save_pretrained(tmp_path)
    code = f"""import remoe
from transformers import LlamaForCausalLM, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
for cls in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
    print(type(cls.from_pretrained({str(tmp_path)!r})).__name__)
"""
    status, output, errors = fresh.run(code)
    assert (status, output.split()) == (0, MODELS), errors[-1000:]


def test_import_of_remoe_alone_leaves_transformers_out():
    code = "import sys, remoe; print('transformers' in sys.modules or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def classifier(**changes):
    torch.manual_seed(0)
    config = remoe.RemoeConfig(**SIZES, num_labels=3, **changes)
    return remoe.RemoeForSequenceClassification(config).eval()


def test_classifier_reads_the_last_token_of_either_padding():
    model = classifier(pad_token_id=0)
    ids = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    alone = model(ids).logits
    right, left = F.pad(ids, (0, 4)), F.pad(ids, (4, 0))
    torch.testing.assert_close(model(right, attention_mask=(right != 0).long()).logits, alone)
    torch.testing.assert_close(model(right).logits, alone)
    position_ids = F.pad(torch.arange(10), (4, 0)).repeat(2, 1)
    outputs = model(left, attention_mask=(left != 0).long(), position_ids=position_ids)
    torch.testing.assert_close(outputs.logits, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_folder_lacks_starts_as_in_a_new_model(dtype, tmp_path):
    """lambda is the head's, so that a base model's folder has none; another router's state is not there either."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4}
    config = remoe.RemoeConfig(**sizes, sparsity={"lambda_init": 0.25})
    remoe.RemoeModel(config).save_pretrained(tmp_path / "base")
    for cls in (remoe.RemoeForCausalLM, remoe.RemoeForSequenceClassification):
        loaded = cls.from_pretrained(tmp_path / "base", dtype=dtype).sparsity
        assert all(buffer.dtype != torch.bfloat16 for buffer in loaded.buffers())
        assert (loaded.lam, loaded.sparsity, loaded.mean_error) == (0.25, -1, 0)
        assert not loaded.dead_steps_L.any()
    whole = remoe.RemoeForCausalLM(config)
    whole.sparsity.lam.fill_(0.5)
    whole.save_pretrained(tmp_path / "whole")
    assert remoe.RemoeForCausalLM.from_pretrained(tmp_path / "whole").sparsity.lam == 0.5
    for router in ("sigmoid", "threshold", "expert_choice"):
        options = {"router": router, "sparsity": {"lambda_init": 1e-8}, "dtype": dtype}
        other = remoe.RemoeForCausalLM.from_pretrained(tmp_path / "whole", **options)
        for layer in other.model.layers:
            buffers = list(layer.mlp.router.buffers())
            assert not any(buffer.any() or buffer.dtype == torch.bfloat16 for buffer in buffers)
            assert layer.mlp.router.weight.dtype == dtype
    with torch.device("meta"):
        empty = remoe.RemoeForCausalLM(config)
    empty = empty.to_empty(device="cpu")
    empty.init_weights()
    assert empty.sparsity.lam == 0.25


def test_classifier_needs_to_know_the_padding():
    with pytest.raises(ValueError, match="attention_mask"):
        classifier()(torch.ones(2, 4, dtype=torch.int64))


def test_classifier_trains_with_the_penalty():
    model = classifier(pad_token_id=0).train()
    model.sparsity.lam.fill_(0.3)
    ids, labels = torch.randint(1, 64, (4, 10)), torch.tensor([0, 1, 2, 0])
    outputs = model(ids, labels=labels)
    torch.testing.assert_close(outputs.task_loss, F.cross_entropy(outputs.logits, labels))
    torch.testing.assert_close(outputs.loss, outputs.task_loss + 0.3 * outputs.reg_loss)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.update_routing()
    assert 0 <= model.sparsity.sparsity <= 1


def test_loss_of_a_classifier_in_evaluation_mode_is_the_tasks_alone():
    model = classifier(pad_token_id=0, sparsity={"lambda_init": 0.3})
    ids, labels = torch.randint(1, 64, (4, 10)), torch.tensor([0, 1, 2, 0])
    outputs = model(ids, labels=labels)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    assert outputs.reg_loss > 0
