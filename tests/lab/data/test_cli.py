"""`remoe data prepare` and `remoe data check` from their arguments to their tables."""

from pathlib import Path

import pytest
from small_data import make_texts, write_jsonl

from remoe.errors import ConfigError, DataError
from remoe.lab.cli.data import check_command, prepare_command
from remoe.lab.data import open_dataset


def test_prepare_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(write_jsonl(tmp_path / f"{name}.jsonl", make_texts(30, seed=i))) for i, name in enumerate("ab")]
    held = str(write_jsonl(tmp_path / "held.jsonl", make_texts(5, seed=9), domain="a"))
    out = tmp_path / "out"
    flags = ["--out", str(out), "--validation", held, "--vocab-size", "300", "--shard-tokens", "2000"]
    assert prepare_command([*sources, *flags]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"{out}: 65 documents, ")
    assert "MB/s" in lines[-1]
    assert "train shards, 1 validation shards" in lines[-1]
    assert prepare_command([*sources, *flags]) == 0
    assert capsys.readouterr().err == f"{out}: already prepared with these arguments\n"

    assert check_command([str(out)]) == 0
    words = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    split = open_dataset(out).train
    for domain in "ab":
        counts = split.record.domains[domain]
        row = next(row for row in words if row[:2] == ["train", domain])
        assert row[2:4] == [str(counts.documents), str(counts.tokens)]
        assert row[5] == f"{counts.tokens / counts.bytes:.3f}"

    shard = out / "train-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0x80
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.safetensors"):
        check_command([str(out)])


def test_quiet_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", ["one", "two", "three"])
    prepare_command([str(source), "--out", str(tmp_path / "out"), "--vocab-size", "260", "--quiet"])
    assert capsys.readouterr() == ("", "")


def test_bad_arguments_are_config_errors(tmp_path: Path) -> None:
    for argv in (["x.txt"], ["x.txt", "--out", str(tmp_path), "--shard-tokens", "many"]):
        with pytest.raises(ConfigError):
            prepare_command(argv)
    with pytest.raises(ConfigError, match="--validation-fraction must lie between 0 and 1"):
        prepare_command(["x.txt", "--out", str(tmp_path), "--validation-fraction", "2"])
