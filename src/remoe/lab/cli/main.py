"""`remoe COMMAND ...`: finds the command, and turns a user's mistake into one line and exit code 2."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

import remoe
from remoe.errors import ConfigError, RemoeError
from remoe.lab.training.interrupt import SIGPIPE, discard_output, exit_code

# name: (module, function, what it does)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": (
        "remoe.lab.cli.train",
        "train_command",
        "train a language model; without flags a small one, at once",
    ),
    "generate": ("remoe.lab.cli.generate", "generate_command", "write text with a trained model"),
    "eval": (
        "remoe.lab.cli.eval",
        "eval_command",
        "loss, perplexity, bits per byte and sparsity per domain; with --tasks zero-shot accuracy",
    ),
    "report": (
        "remoe.lab.cli.report",
        "report_command",
        "write a page in which one sees how a trained model routes",
    ),
    "export": (
        "remoe.lab.cli.export",
        "export_command",
        "write a model that plain transformers loads, with its code and a model card",
    ),
    "convert upcycle": (
        "remoe.lab.cli.convert",
        "upcycle_command",
        "make a mixture with ReLU routing of a dense model",
    ),
    "convert relufy": ("remoe.lab.cli.convert", "relufy_command", "turn a mixture's TopK routers into ReLU routers"),
    "convert megatron": ("remoe.lab.cli.convert", "megatron_command", "read a checkpoint of the ReMoE authors' code"),
    "compare": (
        "remoe.lab.cli.compare",
        "compare_command",
        "train routers, seeds, sizes side by side from one file: tables and figures",
    ),
    "plan": (
        "remoe.lab.cli.plan",
        "plan_command",
        "parameters, FLOPs and memory of a model, before it is trained",
    ),
    "bench layer": (
        "remoe.lab.cli.bench",
        "layer_command",
        "time one layer against dense and other implementations",
    ),
    "bench decode": ("remoe.lab.cli.bench", "decode_command", "the same for a few tokens, as in generation"),
    "bench train-step": (
        "remoe.lab.cli.bench",
        "train_step_command",
        "time whole training steps against transformers'",
    ),
    "data prepare": ("remoe.lab.cli.data", "prepare_command", "turn text into token shards"),
    "data check": ("remoe.lab.cli.data", "check_command", "verify prepared data and show what is in it"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    with _imports_end_at_an_interrupt():
        from remoe.lab.cli.parsing import fail

        code = 0
        try:
            code = _run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()  # else Python does when it ends, and complains where nobody reads any more
            return code
        except RemoeError as error:
            return fail(str(error))
        except BrokenPipeError:  # `remoe ... | head`
            discard_output()
            return code or exit_code(SIGPIPE)
        except OSError as error:  # a missing folder, no permission, a full disk: the user's to mend
            return fail(" ".join(str(error).split()))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return exit_code(signal.SIGINT)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"remoe {remoe.__version__}")
        return 0
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    name = " ".join(argv[:2]) if argv[0] in groups else argv[0]
    if name not in COMMANDS:
        if argv[0] in groups and (len(argv) == 1 or argv[1] in ("-h", "--help")):
            print(_help(argv[0]))
            return 0 if len(argv) > 1 else 2
        raise ConfigError(f"unknown command {name!r}; choose one of: {', '.join(COMMANDS)}")
    module, function, _ = COMMANDS[name]
    # How often GNU OpenMP's threads look whether the others are done before they sleep. With its own 300,000 a training
    # step becomes ten times slower as soon as another program wants one of the cores; read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for chatty in ("torchao", "torch.utils._pytree"):  # where torchao is installed, transformers imports it
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if files := os.environ.get("REMOE_ROUTERS"):
        import_module("remoe.routing.plugins").load_own_routers(files)
    command: Callable[[list[str]], int] = getattr(import_module(module), function)
    return command(argv[len(name.split()) :])


@contextmanager
def _imports_end_at_an_interrupt() -> Iterator[None]:
    """Context in which SIGINT ends the process at once while a module is imported; else Python's own way stays.

    Some modules, SciPy's among them, turn a KeyboardInterrupt while they are imported into an ImportError.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _handle_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handle_interrupt(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None and caller.f_code is not main.__code__:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(exit_code(number))
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def _help(group: str = "") -> str:
    """What there is, of one group of commands or of all."""
    lines = [
        "remoe: mixture-of-experts with ReLU routing (arXiv 2412.14711)",
        "",
        "usage: remoe COMMAND [OPTIONS]      remoe COMMAND --help explains each option",
        "",
    ]
    lines += [f"  {name:<18}{text}" for name, (_, _, text) in COMMANDS.items() if name.startswith(group)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
