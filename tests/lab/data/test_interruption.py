"""A preparation killed at any step, or stopped by a full disk, ends with the very same bytes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from remoe.lab.data import PrepareOptions, prepare

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL and RLIMIT_FSIZE")

# one process loads the libraries, and forks a child for each run that is to be stopped
PREAMBLE = """
import os, resource, signal, sys
from pathlib import Path
from transformers import AutoTokenizer, PreTrainedTokenizerFast
import remoe.lab.data.preparation as preparation
from remoe.lab.data import PrepareOptions
from remoe.errors import DataError

source, held, out = sys.argv[1:4]
options = PrepareOptions(sources=(source,), validation=(held,), out=Path(out), vocab_size=300,
                         shard_tokens=2000, quiet=True)

def run(before):
    pid = os.fork()
    if pid == 0:
        try:
            before()
            preparation.prepare(options)
        except DataError as error:
            print(error, flush=True)
            os._exit(2)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

KILL_AT_EVERY_STEP = """
replace = os.replace  # each step of the preparation becomes lasting by one of these

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

kills = 0
for moment in range(1, 1000):
    code = run(lambda: kill_at(moment))
    assert code in (0, -signal.SIGKILL), code
    if code == 0:
        break
    kills += 1
print(kills)
"""

FILL_THE_DISK = """
def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))

code = run(limit)
print(code, len(list(Path(out).glob("train-*.safetensors"))))
print([path.name for path in Path(out).iterdir() if path.name.endswith(".tmp")])
print(run(lambda: None))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "preparation.json"
    }


def run_script(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture
def sources(
    tmp_path: Path, make_texts: Callable[..., list[str]], write_jsonl: Callable[..., Path]
) -> tuple[Path, Path]:
    texts = [
        *make_texts(60, seed=1),
        " ".join(make_texts(1, seed=2, words=20_000)),
    ]  # the last one needs 60 kB
    held = write_jsonl(tmp_path / "held.jsonl", make_texts(30, seed=3))
    return write_jsonl(tmp_path / "source.jsonl", texts), held


@pytest.fixture
def uninterrupted(tmp_path: Path, sources: tuple[Path, Path], small_options: Callable[..., PrepareOptions]) -> Path:
    source, held = sources
    settings = {"validation": (str(held),), "validation_fraction": 0.02}
    return prepare(small_options(tmp_path / "uninterrupted", source, **settings))


def test_killed_at_every_step_and_resumed(tmp_path: Path, sources: tuple[Path, Path], uninterrupted: Path) -> None:
    kills = int(run_script(KILL_AT_EVERY_STEP, *sources, tmp_path / "killed"))
    # journal, tokenizer and journal, two for each of at least four shards, manifest and journal
    assert kills > 10
    assert files_of(tmp_path / "killed") == files_of(uninterrupted)
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, sources: tuple[Path, Path], uninterrupted: Path
) -> None:
    sizes = sorted(path.stat().st_size for path in uninterrupted.glob("train-*.safetensors"))
    limit = sizes[-1] - 1000  # all but the large last shard fit
    assert max(sizes[-2], *(path.stat().st_size for path in (uninterrupted / "tokenizer").iterdir())) < limit
    message, state, leftovers, resumed = run_script(FILL_THE_DISK, *sources, tmp_path / "full", limit).splitlines()
    assert "train-" in message
    assert "cannot be written: File too large; what was finished is kept" in message
    assert state == f"2 {len(sizes) - 1}"
    assert leftovers == "[]"
    assert resumed == "0"
    assert files_of(tmp_path / "full") == files_of(uninterrupted)
