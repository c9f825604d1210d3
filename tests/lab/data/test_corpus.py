"""Raw text where a command trains: prepared once, found again, and told apart from every other kind of folder."""

import pytest
from small_data import make_texts

from remoe.errors import ConfigError, DataError
from remoe.lab.cli.main import main
from remoe.lab.data import open_dataset
from remoe.lab.data.corpus import open_data


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of raw text beside the working folder."""
    folder = tmp_path / "my_texts"
    folder.mkdir()
    for number, text in enumerate(make_texts(12, seed=3)):
        (folder / f"{number}.txt").write_text(text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_text_is_prepared_once_and_the_output_says_where(texts, tmp_path, capsys):
    made = open_data(str(texts), tmp_path / "runs", 280)
    place = tmp_path / "runs" / "data" / "my_texts-bpe280"
    assert made.path == place
    printed = capsys.readouterr()
    assert f"preparing the text of {texts} in {place}" in printed.out
    assert "tokenised" in printed.err
    written = (place / "dataset.json").stat().st_mtime_ns
    again = open_data("../my_texts/", tmp_path / "runs", 280)
    assert again.fingerprint == made.fingerprint
    assert (place / "dataset.json").stat().st_mtime_ns == written
    assert capsys.readouterr() == (f"the text of ../my_texts/ is prepared in {place}\n", "")
    assert open_data(str(place), tmp_path / "other", 999).fingerprint == made.fingerprint  # of `data prepare`
    assert capsys.readouterr().out == ""


def test_changed_text_and_another_of_the_same_name_are_prepared_beside_it(texts, tmp_path):
    first = open_data(str(texts), tmp_path, 280)
    (texts / "0.txt").write_text("quite another text than before")
    changed = open_data(str(texts), tmp_path, 280)
    other = tmp_path / "elsewhere" / "my_texts"
    other.mkdir(parents=True)
    (other / "all.txt").write_text(" ".join(make_texts(3, seed=4)))
    foreign = open_data(str(other), tmp_path, 280)
    assert [made.path.name for made in (first, changed, foreign)] == [
        "my_texts-bpe280", "my_texts-bpe280-2", "my_texts-bpe280-3",
    ]  # fmt: skip
    assert len({made.fingerprint for made in (first, changed, foreign)}) == 3
    assert open_dataset(first.path).fingerprint == first.fingerprint
    assert open_data(str(texts), tmp_path, 280).path == changed.path
    assert open_data(str(other), tmp_path, 280).path == foreign.path


def test_a_single_file_is_text(texts, tmp_path):
    (tmp_path / "input.txt").write_text(" ".join(make_texts(5, seed=5)))
    made = open_data(str(tmp_path / "input.txt"), tmp_path, 280)
    assert made.path.name == "input.txt-bpe280"
    assert made.train.num_tokens > made.validation.num_tokens > 0


def test_what_is_no_text_is_one_line(texts, tmp_path, prepared):
    for content, words in (
        ({}, "has no files to read"),
        ({"dataset.json": "{"}, "dataset.json"),
        ({"config.yaml": "steps: 3", "sample.txt": "a", "tokenizer/tokenizer_config.json": "{}"}, "not a dataset"),
        ({"preparation.json": "{}"}, "unfinished"),
    ):
        folder = tmp_path / f"folder{len(words)}"
        for name, text in content.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        folder.mkdir(exist_ok=True)
        with pytest.raises(DataError, match=words):
            open_data(str(folder), tmp_path / "runs", 280)
    with pytest.raises(DataError, match="no such dataset folder"):
        open_data(str(tmp_path / "nowhere"), tmp_path / "runs", 280)
    with pytest.raises(ConfigError, match=r"is inside it; move the texts .* or write the run elsewhere"):
        open_data(str(texts), texts / "runs", 280)
    assert not (tmp_path / "runs").exists()
    assert not (texts / "runs").exists()


def test_commands_that_need_a_dataset_name_the_command_that_makes_one(texts, capsys):
    with pytest.raises(DataError, match=r"raw text.*data prepare \S*my_texts --out DIR --tokenizer 'a run/tokenizer'"):
        open_dataset(texts, tokenizer="a run/tokenizer")
    source = texts.parent / "model"
    for argv in (["data", "check", str(texts)], ["convert", "upcycle", str(source), "out", "--data", str(texts)]):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"remoe data prepare {texts} --out DIR" in error
        assert (f"--tokenizer {source}" in error) == (argv[0] == "convert")
