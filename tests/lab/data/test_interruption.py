"""A preparation killed at any step, or stopped by a full disk, ends with the same bytes as an uninterrupted one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import files_of, make_texts, small_options, write_jsonl

from remoe.lab.data import prepare

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL and RLIMIT_FSIZE")

# One process loads the libraries, then forks a child for each run that is to be stopped.
SCRIPT = """
import json, os, resource, signal, sys
from pathlib import Path
import pyarrow.parquet
import remoe.lab.data.preparation as preparation
from remoe.lab.data import PrepareOptions, load_tokenizer
from remoe.errors import DataError

tokenizer, source, held, killed, full, limit = sys.argv[1:]
load_tokenizer(tokenizer)  # all that is imported here need not be imported by each child

def run(out, before):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, message = 0, ""
        try:
            before()
            preparation.prepare(PrepareOptions(sources=(source,), validation=(held,), out=Path(out), vocab_size=300,
                                               shard_tokens=2000, quiet=True))
        except DataError as error:
            code, message = 2, str(error)
        except BaseException as error:
            code, message = 3, repr(error)
        os.write(writer, message.encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        message = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), message

replace = os.replace  # each step of the preparation takes effect by one of these

def kill_at(moment):
    def wrapped(*arguments):
        wrapped.count += 1
        if wrapped.count == moment:  # just before the step
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
        wrapped.count += 1
        if wrapped.count == moment:  # just after it
            os.kill(os.getpid(), signal.SIGKILL)
    wrapped.count = 0
    os.replace = wrapped

found = {"kills": 0}
for moment in range(1, 1000):
    code, message = run(killed, lambda: kill_at(moment))
    assert code in (0, -signal.SIGKILL), (code, message)
    if code == 0:
        break
    found["kills"] += 1

found["stopped"] = run(full, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit))))
found["shards"] = len(list(Path(full).glob("train-*.safetensors")))
found["leftovers"] = [path.name for path in Path(full).iterdir() if path.name.endswith(".tmp")]
found["resumed"] = run(full, lambda: None)
print(json.dumps(found))
"""


def dataset_files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name != "preparation.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contains `uninterrupted`, a dataset, and two that were stopped and then finished: `killed` and `full`."""
    folder = tmp_path_factory.mktemp("interruption")
    long = " ".join(make_texts(1, seed=2, words=20_000))  # the last document, which needs 60 kB
    source = write_jsonl(folder / "source.jsonl", [*make_texts(60, seed=1), long])
    held = write_jsonl(folder / "held.jsonl", make_texts(30, seed=3))
    settings = {"validation": (str(held),), "validation_fraction": 0.02}
    prepare(small_options(folder / "uninterrupted", source, **settings))
    return folder


@pytest.fixture(scope="module")
def limit(folder: Path) -> int:
    """A size in bytes under which every file fits except the large last shard."""
    sizes = train_sizes(folder)
    limit = sizes[-1] - 1000
    tokenizer = folder / "uninterrupted" / "tokenizer"
    assert max(sizes[-2], *(path.stat().st_size for path in tokenizer.iterdir())) < limit
    return limit


def train_sizes(folder: Path) -> list[int]:
    return sorted(path.stat().st_size for path in (folder / "uninterrupted").glob("train-*.safetensors"))


@pytest.fixture(scope="module")
def found(folder: Path, limit: int) -> dict:
    """What the script saw of both datasets while it stopped and finished them."""
    places = [folder / name for name in ("uninterrupted/tokenizer", "source.jsonl", "held.jsonl", "killed", "full")]
    command = [sys.executable, "-c", SCRIPT, *map(str, places), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_at_every_step_and_resumed(folder: Path, found: dict) -> None:
    # journal, tokenizer and journal, two for each of at least four shards, manifest and journal
    assert found["kills"] > 10
    assert dataset_files(folder / "killed") == dataset_files(folder / "uninterrupted")
    assert not list((folder / "killed").glob("*.tmp"))


@pytest.mark.slow
def test_full_disk_is_one_line_and_loses_nothing(folder: Path, found: dict) -> None:
    code, message = found["stopped"]
    assert code == 2
    assert "train-" in message
    assert "cannot be written: File too large; finished work is kept" in message
    assert "\n" not in message
    assert found["shards"] == len(train_sizes(folder)) - 1
    assert found["leftovers"] == []
    assert found["resumed"] == [0, ""]
    assert dataset_files(folder / "full") == dataset_files(folder / "uninterrupted")
