"""Python code in processes that have imported neither transformers nor remoe, but what takes transformers long.

An interpreter started for each would spend four of its six seconds on the import of others' packages.
"""

import functools
import importlib.util
import json
import subprocess
import sys

# What transformers' model classes import.
PRELOADED = [
    name
    for name in ("torch._dynamo", "torch.distributed.tensor", "accelerate", "scipy.optimize", "safetensors.torch",
                 "tokenizers", "huggingface_hub", "torchao.quantization")
    if importlib.util.find_spec(name.split(".")[0])
]  # fmt: skip

SERVER = f"""
import contextlib, importlib, json, os, sys, tempfile, traceback
for name in {PRELOADED}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not {{"transformers", "remoe"}} & set(sys.modules)
for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = 1
            try:
                exec(json.loads(line), {{"__name__": "__main__"}})
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    print(json.dumps([status, *texts]), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen:
    """One for each process of tests; it ends when its input closes."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip


def run(code: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `code`."""
    if sys.platform != "linux":  # forks of a process with threads are safe only there
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr
    process = server()
    process.stdin.write(json.dumps(code) + "\n")
    process.stdin.flush()
    return tuple(json.loads(process.stdout.readline()))
