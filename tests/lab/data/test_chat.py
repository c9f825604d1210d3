"""`--chat`: conversations by the tokenizer's template, with the loss on the answers alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_data import small_options, write_json_rows
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

import remoe
from remoe.errors import ConfigError, DataError
from remoe.lab.cli.main import main
from remoe.lab.data import ValidationWindows, open_dataset, prepare, training_batches, verify_hashes
from remoe.lab.data.chat import ChatEncoder

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\n"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
FORGETS = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}\n{% endif %}{% endfor %}"
ANIMALS = ["cow", "sheep", "hen", "goat"]


def chat(number: int) -> list[dict]:
    asked, said = ANIMALS[number % 4], ANIMALS[number % 3]
    turns = [("system", "farm"), ("user", f"{asked} {number}?"), ("assistant", f"{said} {number}."), ("user", "and?")]
    return [{"role": role, "content": text} for role, text in (*turns, ("assistant", f"{asked}, {said}!"))]


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    found = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    found.chat_template = PLAIN
    found.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    rows = [{"messages": chat(number), "domain": "town" if number % 2 else "farm"} for number in range(40)]
    options = {"tokenizer": str(tokenizer), "chat": True, "shard_tokens": 1000}
    return prepare(small_options(root / "data", write_json_rows(root / "chats.jsonl", rows), **options))


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_the_answers_are_the_targets(tokenizer, template):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = template
    ids, targets, size = ChatEncoder(loaded)(json.dumps(chat(1)))
    text = "[system]\nfarm\n[user]\nsheep 1?\n[assistant]\nsheep 1.\n[user]\nand?\n[assistant]\nsheep, sheep!\n"
    assert loaded.decode(ids[:-1]) == text
    assert ids[-1] == loaded.eos_token_id
    assert loaded.decode(ids[:-1][targets[:-1] == 1]) == "sheep 1.\nsheep, sheep!\n"
    assert targets[-1] == 1  # the end of the last answer
    assert size == len("sheep 1.sheep, sheep!")


def test_shards_keep_the_targets(data, tokenizer):
    dataset, encode = open_dataset(data), ChatEncoder(AutoTokenizer.from_pretrained(tokenizer))
    verify_hashes(dataset)
    known = {tuple(ids): (targets, size) for ids, targets, size in (encode(json.dumps(chat(n))) for n in range(40))}
    documents = 0
    for split in (dataset.train, dataset.validation):
        for shard in split.shards:
            for number in range(shard.num_documents):
                first, last = shard.document_offsets[number : number + 2]
                targets, size = known[tuple(shard.tokens[first:last].tolist())]
                assert np.array_equal(shard.targets[first:last], targets)
                assert shard.document_bytes[number] == size
                documents += 1
    assert documents == 40
    assert len(dataset.train.shards) > 1


def test_a_changed_target_is_found(data, tmp_path):
    for path in data.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(data)).parent.mkdir(exist_ok=True)
            (tmp_path / path.relative_to(data)).write_bytes(path.read_bytes())
    shard = open_dataset(tmp_path).train.shards[0]
    content, (_, start, _) = bytearray(shard.path.read_bytes()), shard.layout["targets"]
    content[start] ^= 1
    shard.path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged \(sha256 differs\): train-00000"):
        verify_hashes(open_dataset(tmp_path))


@pytest.mark.parametrize("weights", [{}, {"farm": 1.0, "town": 2.0}], ids=["whole", "weighted"])
def test_batches_mark_the_targets(data, corpus, weights):
    split = open_dataset(data).train
    batches = training_batches(split, 16, 8, 0, weights)
    targets = {}
    for shard in split.shards:  # what follows four tokens tells where a window is, or the same words are there
        for place in range(4, shard.num_tokens):
            targets.setdefault(tuple(shard.tokens[place - 4 : place + 1].tolist()), set()).add(
                int(shard.targets[place])
            )
    token_BS, mask_BS = batches.batch(3), batches.target_mask(3)
    assert mask_BS.shape == (8, 16)
    for row, mask in zip(token_BS.tolist(), mask_BS.tolist(), strict=True):
        for place in range(4, 17):
            assert int(mask[place - 1]) in targets.get(tuple(row[place - 4 : place + 1]), {0, 1})
    assert torch.equal(batches.target_mask(3, range(2, 5)), mask_BS[2:5])
    assert 0.05 < mask_BS.float().mean() < 0.8
    assert training_batches(open_dataset(corpus).train, 16, 8, 0, {}).target_mask(0) is None


def test_validation_predicts_the_answers_alone(data):
    split = open_dataset(data).validation
    (input_NS, target_NS, mask_NS), *_ = ValidationWindows(split, 16).batches("farm", 64)
    wanted = target_NS != -100
    index = split.domains.index("farm")
    expected = [
        shard.targets[first:last]
        for shard in split.shards
        for first, last, domain in zip(
            shard.document_offsets, shard.document_offsets[1:], shard.document_domain, strict=False
        )
        if domain == index
    ]
    assert wanted.sum() == np.concatenate(expected)[1:].sum()
    assert torch.equal(target_NS[:, :-1][wanted[:, :-1]], input_NS[:, 1:][wanted[:, :-1]])
    assert mask_NS.sum() > wanted.sum()


def test_training_has_the_loss_of_the_answers(data, tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4}
    torch.manual_seed(0)
    model = remoe.RemoeForCausalLM(remoe.RemoeConfig(**sizes, vocab_size=320, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    flags = ["--steps", "1", "--batch-size", "4", "--micro-batch-size", "2", "--seq-len", "16", "--device", "cpu"]
    flags += ["--mesh-load", "official"]  # so that the penalty of a micro-batch is that of the micro-batch alone
    assert main(["train", "--from", str(tmp_path / "model"), "--data", str(data), "--out", str(out), *flags]) == 0
    batches = training_batches(open_dataset(data).train, 16, 4, 0, {})
    token_BS, mask_BS = batches.batch(0), batches.target_mask(0)
    with torch.no_grad():
        logits = model(token_BS[:, :-1]).logits
        parts = [model.sparsity.regularizer(model(part[:, :-1]).routings) for part in token_BS.split(2)]
    record = json.loads((out / "metrics.jsonl").read_text())
    assert record["lm_loss"] == pytest.approx(cross_entropy(logits[mask_BS], token_BS[:, 1:][mask_BS]).item(), rel=1e-5)
    assert record["reg_loss"] == pytest.approx(sum(parts).item() / 2, rel=1e-5)  # over all tokens, as ever
    assert load_file(next((out / "checkpoints").glob("*/model.safetensors"))).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "no column 'messages'"),
        ({"messages": "a"}, "line 1: the conversation is not a list of messages"),
        ({"messages": [{"role": "user"}]}, "line 1: a message must have `role` and `content`"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 1: no message of the role 'assistant'"),
    ],
)
def test_what_is_no_conversation_is_named(tokenizer, tmp_path, row, words):
    source = write_json_rows(tmp_path / "chats.jsonl", [row, {"messages": chat(1)}])
    with pytest.raises(DataError, match=words):
        prepare(small_options(tmp_path / "data", source, tokenizer=str(tokenizer), chat=True))


def test_what_a_template_cannot_do_is_said(corpus, tokenizer, tmp_path):
    source = write_json_rows(tmp_path / "chats.jsonl", [{"messages": chat(n)} for n in range(4)])
    with pytest.raises(ConfigError, match="--chat needs --tokenizer"):
        small_options(tmp_path / "data", source, chat=True)
    with pytest.raises(DataError, match="needs a tokenizer with one chat template"):
        prepare(small_options(tmp_path / "data", source, tokenizer=str(corpus / "tokenizer"), chat=True))
    with pytest.raises(DataError, match=r"--chat reads \.jsonl files alone"):
        prepare(small_options(tmp_path / "data", "stdlib", tokenizer=str(tokenizer), chat=True))
    alone = write_json_rows(tmp_path / "one.jsonl", [{"messages": chat(1)}])
    with pytest.raises(DataError, match="a single source item cannot be divided"):
        prepare(small_options(tmp_path / "data", alone, tokenizer=str(tokenizer), chat=True))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = FORGETS
    with pytest.raises(DataError, match="'farm': it writes earlier messages in another way when later ones follow"):
        ChatEncoder(loaded)(json.dumps(chat(1)))
    loaded.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(DataError, match="no system message"):
        ChatEncoder(loaded)(json.dumps(chat(1)))
