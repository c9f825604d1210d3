"""A model that is built on several processes has the values of one process, and is never whole on any of them."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from ranks import run_ranks

from remoe.errors import ConfigError
from remoe.lab.data import open_dataset
from remoe.lab.training.build import model_config
from remoe.lab.training.config import config_from_dict
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.mesh import mesh_of
from remoe.lab.training.origin import open_origin
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.sharded import build_sharded
from remoe.lab.training.shards import read_model
from remoe.lab.training.trainer import Trainer
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.deferred import Deferred, allocate
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.sharding import local, shard_of

TOO_OLD = version.parse(transformers.__version__) < version.parse("5.24")
MESHES = {"fsdp=2,ep=2": "relu", "fsdp=2": "relu_norm", "tp=2": "topk", "replicate=2": "sparsemixer"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BIG = {"hidden_size": 256, "num_hidden_layers": 16, "num_attention_heads": 4, "intermediate_size": 512}


def options(data, mesh=None, model=SIZES, **changed):
    common = {"seq_len": 16, "batch_size": 4, "micro_batch_size": 2, "num_experts": 4, "device": "cpu", "steps": 1}
    return config_from_dict({**common, "data": str(data), "mesh": mesh, "model": model, **changed}, "test")


def whole_model(config, dataset):
    torch.manual_seed(config.seed)
    return RemoeForCausalLM(model_config(config, dataset.vocab_size, dataset.eos_token_id))


class Peak:
    """The most resident memory within a context, above that at its start, in bytes."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._before = self._read("VmRSS")
        return self

    def __exit__(self, *_):
        self.bytes = self._read("VmHWM") - self._before

    def _read(self, name):
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


class Whole:
    def __init__(self, tensor):
        self.tensor = tensor

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, slices):
        return self.tensor[slices]


def check_values(model, expected):
    """The parts of this process are those of a whole model, bit for bit."""
    found, wanted = dict(model.named_parameters()) | dict(model.named_buffers()), dict(expected.named_parameters())
    wanted |= dict(expected.named_buffers())
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(local(tensor), shard_of(Whole(wanted[name].detach()), tensor)), name


def _on_ranks(rank, folder, data, origin):
    dataset = open_dataset(data)
    for mesh, router in MESHES.items():
        config = options(data, mesh, router=router)
        ranks = Ranks(mesh_of(config), "cpu")
        torch.manual_seed(config.seed)
        model = build_sharded(config, dataset, RunFolder(folder / "none"), ranks, None)
        state = torch.get_rng_state()
        check_values(model, whole_model(config, dataset))
        assert torch.equal(state, torch.get_rng_state())
    config, found = options(data, "fsdp=2"), open_origin(origin)
    model = build_sharded(config, dataset, RunFolder(folder / "none"), Ranks(mesh_of(config), "cpu"), found)
    check_values(model, found.load(config))
    _memory(rank, folder, data, dataset)


def _memory(rank, folder, data, dataset):
    config = options(data, "fsdp=2", BIG)
    ranks, run, sizes = Ranks(mesh_of(config), "cpu"), RunFolder(folder / "run"), {}
    with Peak() as peak:
        trainer = Trainer(config, dataset, run, ranks)
    sizes["built"] = peak.bytes
    if ranks.first:
        run.create(config, dataset.tokenizer_path)
    ranks.wait()
    trainer.save()
    trainer.saving.wait()
    del trainer
    config.resume = True
    with Peak() as peak:
        trainer = Trainer(config, dataset, run, ranks)
        trainer.resume()
    sizes["resumed"] = peak.bytes
    check_values(trainer.model, whole_model(config, dataset))
    sizes["whole"] = sum(4 * parameter.numel() for parameter in trainer.model.parameters())
    (folder / f"sizes-{rank}.json").write_text(json.dumps(sizes))


@pytest.mark.slow
@pytest.mark.skipif(TOO_OLD, reason="sharding needs transformers 5.24")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_each_process_builds_its_own_parts_and_one_process_reads_the_model_once(corpus, tmp_path):
    dataset = open_dataset(corpus)
    whole_model(options(corpus, seed=1), dataset).save_pretrained(tmp_path / "origin")
    run_ranks(_on_ranks, tmp_path, corpus, tmp_path / "origin")
    for rank in range(2):
        sizes = json.loads((tmp_path / f"sizes-{rank}.json").read_text())
        for when in ("built", "resumed"):
            # half of it, one matrix and what the allocator keeps; the whole model and its half would be 1.5
            assert sizes[when] < 1.25 * sizes["whole"], when
    checkpoint = RunFolder(tmp_path / "run").last_checkpoint()
    with Peak() as peak:
        model = read_model(checkpoint)
    mapped = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))  # pages that the system can drop
    assert peak.bytes - mapped < 1.5 * sizes["whole"]
    assert model.num_parameters() == sizes["whole"] / 4


def test_a_model_with_tied_embeddings_is_not_spread(corpus, tmp_path):
    dataset = open_dataset(corpus)
    tied = model_config(options(corpus), dataset.vocab_size, dataset.eos_token_id)
    tied.tie_word_embeddings = True
    RemoeForCausalLM(tied).save_pretrained(tmp_path)
    origin = open_origin(tmp_path)
    assert origin.base({"seq_len": 16}, "flags").mesh is None
    with pytest.raises(ConfigError, match="--mesh cannot be used yet with tied embeddings"):
        origin.base({"seq_len": 16, "mesh": "fsdp=2"}, "flags")


@pytest.mark.parametrize("router", ["relu", "topk", "sparsemixer", "hash", "lory", "relu_norm"])
def test_values_that_are_drawn_later_are_those_of_the_constructor(router):
    shape = {"vocab_size": 64, "num_experts": 4, "router": router, "shared_expert_size": 8, "pad_token_id": 3, **SIZES}
    shape |= {"intermediate_size": 24, "qk_norm": router == "topk", "tie_word_embeddings": router == "hash"}
    torch.manual_seed(0)
    expected = RemoeForCausalLM(RemoeConfig(**shape))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    with Deferred() as deferred:
        model = RemoeForCausalLM(RemoeConfig(**shape))
    assert torch.equal(torch.get_rng_state(), after)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    assert all(parameter.is_meta for parameter in matrices)
    deferred.remember(model)
    allocate(model, torch.device("cpu"))
    deferred.fill(model)
    assert torch.equal(torch.get_rng_state(), after)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (router == "hash")
    check_values(model, expected)
