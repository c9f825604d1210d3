"""`remoe COMMAND ...`: runs a command, and reports a user's mistake in one line with exit code 2.

Imports nothing but Python's own modules, so that it can say which package is missing.
"""

import contextlib
import difflib
import io
import logging
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

import remoe
from remoe.errors import ConfigError, RemoeError, missing_extra
from remoe.lab.memory import ran_out
from remoe.lab.text import RED, YELLOW, for_terminal, short_name, visible
from remoe.lab.training.interrupt import ENDS, SIGPIPE, discard_output, exit_code
from remoe.lab.training.words import early_words, ended_early

LONGEST_ERROR = 1000  # characters: more than that is an argument, of which the ends tell enough

# name: (module, function, help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": ("remoe.lab.cli.train", "train_command", "train a language model; without flags a small one, in minutes"),
    "generate": ("remoe.lab.cli.generate", "generate_command", "generate text with a trained model"),
    "eval": (
        "remoe.lab.cli.eval",
        "eval_command",
        "loss, perplexity, bits per byte and sparsity per domain; with --tasks, zero-shot accuracy",
    ),
    "serve": ("remoe.lab.cli.serve", "serve_command", "answer requests of OpenAI's API with a trained model"),
    "watch": ("remoe.lab.cli.watch", "watch_command", "show a run in a browser while it trains"),
    "record": (
        "remoe.lab.cli.record",
        "record_command",
        "record experts, gates and loss of each token of a text, for any mixture of experts",
    ),
    "report": ("remoe.lab.cli.report", "report_command", "write an HTML page that shows how a model routes"),
    "export": (
        "remoe.lab.cli.export",
        "export_command",
        "write a model that transformers loads without remoe, with its code and a model card",
    ),
    "convert upcycle": (
        "remoe.lab.cli.convert",
        "upcycle_command",
        "convert a dense model into a ReLU-routed mixture of experts",
    ),
    "convert relufy": (
        "remoe.lab.cli.convert",
        "relufy_command",
        "replace the top-k routers of a mixture of experts by ReLU routers",
    ),
    "convert megatron": (
        "remoe.lab.cli.convert",
        "megatron_command",
        "convert a checkpoint of the ReMoE authors' code",
    ),
    "compare": (
        "remoe.lab.cli.compare",
        "compare_command",
        "train and compare routers, seeds and sizes, described in one file: tables and figures",
    ),
    "plan": ("remoe.lab.cli.plan", "plan_command", "parameters, FLOPs and memory of a model, before training it"),
    "bench layer": (
        "remoe.lab.cli.bench",
        "layer_command",
        "time one layer against a dense layer and other implementations",
    ),
    "bench decode": ("remoe.lab.cli.bench", "decode_command", "time one layer on a few tokens, as in generation"),
    "bench generate": (
        "remoe.lab.cli.bench",
        "generate_command",
        "time the writing of text, beside transformers' Mixtral",
    ),
    "bench lora": ("remoe.lab.cli.bench", "lora_command", "time LoRA on the experts of one layer against PEFT's"),
    "bench train-step": (
        "remoe.lab.cli.bench",
        "train_step_command",
        "time training steps against transformers' Mixtral",
    ),
    "bench diff": ("remoe.lab.cli.bench", "diff_command", "show the ratios between two files of measurements"),
    "data prepare": ("remoe.lab.cli.data", "prepare_command", "convert text into token shards"),
    "data check": ("remoe.lab.cli.data", "check_command", "verify prepared data and show its contents"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    Args:
        argv: arguments; those of the process by default.
    """
    _open_streams()
    with _signals_end_it(), _warnings_shown():
        code = 0
        try:
            code = _run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()  # otherwise Python does so at exit, with a traceback when the reader is gone
            return code
        except RemoeError as error:
            return _fail(str(error))
        except ModuleNotFoundError as error:
            return _fail(str(missing_extra(error, "lab", "this command")))
        except BrokenPipeError:  # `remoe ... | head`
            discard_output()
            return code or exit_code(SIGPIPE)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            return _fail("out of memory: smaller sizes, such as --batch-size or --max-tokens, need less")
        except OSError as error:  # a missing folder, no permission, a full disk: the user can fix it
            return _fail(" ".join(str(error).split()))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return exit_code(signal.SIGINT)


def _open_streams() -> None:
    """Makes printing work whatever standard output and standard error are: closed, or of few characters."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # otherwise the next file that is opened would get this number, and what others print
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open as long as the process lives
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


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
        near = difflib.get_close_matches(
            " ".join(argv[:2]) if argv[0] in groups else argv[0], [*COMMANDS, *groups], n=1
        )
        guess = f"; perhaps you meant {near[0]!r}" if near else ""
        raise ConfigError(f"unknown command {name!r}{guess}; choose one of: {', '.join(COMMANDS)}")
    module, function, _ = COMMANDS[name]
    arguments = argv[len(name.split()) :]
    with early_words(arguments) if name == "train" else contextlib.nullcontext():
        before_imports()
        if files := os.environ.get("REMOE_ROUTERS"):
            import_module("remoe.routing.plugins").load_own_routers(files)
        command: Callable[[list[str]], int] = getattr(import_module(module), function)
        return command(arguments)


def before_imports() -> None:
    """Settings of PyTorch and transformers that they read when they are imported."""
    # How often GNU OpenMP's threads poll for the others before they sleep. With OpenMP's default of 300,000 a training
    # step becomes ten times slower as soon as another program uses one of the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for chatty in ("torchao", "torch.utils._pytree"):  # transformers imports torchao when it is installed
        logging.getLogger(chatty).setLevel(logging.ERROR)


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Context in which SIGINT raises KeyboardInterrupt, and SIGTERM and SIGHUP SystemExit, so that files are tidied up.

    During an import they end the process at once: some modules, SciPy's among them, turn a KeyboardInterrupt during
    their import into an ImportError.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
        handlers = {number: signal.getsignal(number) for number in ENDS}
        before = {n: was for n, was in handlers.items() if was in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    caller = frame
    while caller is not None and caller.f_code is not main.__code__:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            with contextlib.suppress(OSError):
                os.write(2, b"interrupted\n")
            ended_early(f"ended by signal {number}")
            os._exit(exit_code(number))
        caller = caller.f_back
    if number == signal.SIGINT:
        signal.default_int_handler(number, frame)
    raise SystemExit(exit_code(number))


def _fail(message: str) -> int:
    """Prints one line of error; returns exit code 2."""
    with contextlib.suppress(OSError):  # the terminal is closed
        line = f"remoe: error: {short_name(message, LONGEST_ERROR)}"
        print(for_terminal(line, sys.stderr, RED), file=sys.stderr)
    return 2


class _Warnings(logging.Handler):
    """Writes warnings to standard error, as Python does where no handler is set, but in a terminal's colours."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        try:
            print(for_terminal(visible(record.getMessage()), sys.stderr, YELLOW), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    handler = _Warnings(logging.WARNING)
    logging.getLogger("remoe").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("remoe").removeHandler(handler)


def _help(group: str = "") -> str:
    """The list of commands: of one group, or of all."""
    lines = [
        "remoe: mixture-of-experts with ReLU routing (arXiv 2412.14711)",
        "",
        "usage: remoe COMMAND [OPTIONS]      remoe COMMAND --help explains the options",
        "",
    ]
    for name, (_, _, text) in COMMANDS.items():
        if name.startswith(group):
            lines += textwrap.wrap(f"  {name:<18}{text}", 80, subsequent_indent=20 * " ", break_on_hyphens=False)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
