"""A tokenizer that is missing, or that has tokens which its model does not know, is one line."""

import shutil

import pytest
from tiny_run import FLAGS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import remoe
from remoe.lab.cli.main import main

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_tokenizer(folder, size):
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, size)}
    backend = Tokenizer(WordLevel(words, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)


def ours(folder, **options):
    remoe.RemoeForCausalLM(remoe.RemoeConfig(**SIZES, num_experts=4, vocab_size=32, **options)).save_pretrained(folder)


def dense(folder):
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32)).save_pretrained(folder)


def one_line(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


COMMANDS = ["generate M", "eval M", "report M", "convert upcycle M O", "convert relufy M O --data D"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_larger_than_the_model_is_refused(command, corpus, tmp_path, capsys):
    dense(tmp_path) if command.startswith("convert") else ours(tmp_path)
    write_tokenizer(tmp_path, 40)
    places = {"M": str(tmp_path), "O": str(tmp_path / "out"), "D": str(corpus)}
    assert "has 40 tokens, the model 32" in one_line([places.get(word, word) for word in command.split()], capsys)
    assert not (tmp_path / "out").exists()


def test_ids_that_are_no_tokens_do_not_count(tmp_path, capsys):
    ours(tmp_path, tokenizer_size=20)
    write_tokenizer(tmp_path, 32)
    assert "has 32 tokens, the model 20" in one_line(["generate", str(tmp_path)], capsys)
    write_tokenizer(tmp_path, 20)
    assert main(["generate", str(tmp_path), "--prompt", "w1", "--max-new-tokens", "1"]) == 0


def test_a_model_without_a_tokenizer_says_so(tmp_path, capsys):
    ours(tmp_path)
    assert one_line(["generate", str(tmp_path)], capsys).endswith("holds no tokenizer: tokenizer.json is missing")


def test_a_run_without_its_tokenizer_says_so(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--data", str(corpus), "--out", str(run), "--steps", "1", *FLAGS]) == 0
    shutil.rmtree(run / "tokenizer")
    capsys.readouterr()
    for command in (["generate"], ["eval"], ["report"], ["export", str(tmp_path / "out")]):
        line = one_line([command[0], str(run), *command[1:]], capsys)
        assert line.endswith("tokenizer is missing"), command
