"""Training on a stream: a resumed run is bit-identical to one that nothing happened to."""

import shutil

import pytest
from small_data import make_texts, write_jsonl
from tiny_run import FLAGS
from whole_run import same_run

from remoe.lab.cli.main import main
from remoe.lab.data import stream_batches
from remoe.lab.training.checkpoint import list_checkpoints


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_batches, "BLOCK", 4)  # step 3 ends within a block of each of the two parts
    (tmp_path / "texts").mkdir()
    for file in range(2):
        write_jsonl(tmp_path / "texts" / f"{file}.jsonl", make_texts(25, seed=file))
    return tmp_path / "texts"


def test_a_run_on_a_stream_is_resumed_exactly(texts, corpus, tmp_path, capsys):
    def train(out, *flags):
        stream = ["--data", str(texts), "--stream", "--tokenizer", str(corpus / "tokenizer")]
        steps = ["--steps", "5", "--checkpoint.every", "3", "--seq-len", "16", "--prompt", "a" * 30]
        return main(["train", "--out", str(tmp_path / out), *stream, *FLAGS, *steps, *flags])

    assert train("whole") == 0
    assert "as a stream in 2 parts, but for the documents that are held out (2%; " in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(list_checkpoints(tmp_path / "resumed" / "checkpoints")[-1])
    assert main(["train", "--out", str(tmp_path / "resumed"), "--resume"]) == 0
    same_run(tmp_path / "whole", tmp_path / "resumed")
    assert train("weighted", "--domain-weights", "texts", "1") == 2
    assert "of which no domains are known" in capsys.readouterr().err
    assert main(["train", "--stream", "--out", str(tmp_path / "none")]) == 2
    assert main(["train", "--stream", "--data", str(corpus), "--out", str(tmp_path / "none")]) == 2
    assert "read without it" in capsys.readouterr().err
