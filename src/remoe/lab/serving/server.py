"""transformers' own server, OpenAI's API over HTTP, with one model of ours behind it.

That server looks a model's class up in transformers itself, which has none of ours. It gets a manager of models that
holds a single model, loaded as all commands load theirs.
"""

import errno
import inspect
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import transformers
from transformers import BatchEncoding, ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase

from remoe.errors import ConfigError, check, missing_extra
from remoe.lab.data.tokenizer import vocabulary_size
from remoe.lab.serving.dial import set_dial, with_dial
from remoe.lab.serving.gate import Gate
from remoe.lab.training.load import load_model
from remoe.models.modeling_remoe import RemoeForCausalLM

if TYPE_CHECKING:
    from fastapi.responses import JSONResponse

# Continuous batching without a GPU: the share of the memory for its cache, of which transformers takes 0.6, and the
# tokens of one forward pass.
CPU_BATCHING: dict[str, float | int] = {"max_memory_percent": 0.2, "max_batch_tokens": 512}

HANDLERS = {  # by argument of `build_server`: module and class
    "chat_handler": ("chat_completion", "ChatCompletionHandler"),
    "completion_handler": ("completion", "CompletionHandler"),
    "response_handler": ("response", "ResponseHandler"),
    "transcription_handler": ("transcription", "TranscriptionHandler"),
    "systemone_handler": ("systemone", "SystemOneHandler"),
}
WRITING = ("chat_handler", "completion_handler", "response_handler")  # those that write text
GRACE = 2.0  # seconds for what is being answered when the server ends
KEEP_ALIVE = 65  # seconds: longer than clients keep a connection, or one may send a request on it as it is closed
NEEDED = {  # what else is used of transformers' server: module, function or class, arguments
    ("server", "build_server"): {"model_manager", "generation_state", *HANDLERS},
    ("model_manager", "ModelManager"): {"device", "continuous_batching", "force_model"},
    ("utils", "GenerationState"): {"continuous_batching"},
    ("utils", "GenerateManager"): set(),
    ("utils", "CBGenerateManager"): {"cb_config"},
}


def load_served(folder: str | Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, with the settings of generation that the server reads from them.

    Args:
        folder: a run, one of its checkpoints, or the folder of a model.
        device: where the model is put.

    Raises:
        CheckpointError: when there is no model, or it cannot be loaded.
        DataError: when its tokenizer cannot be loaded.
    """
    model, tokenizer, _ = load_model(folder)
    settings = model.generation_config
    settings.do_sample = True  # otherwise the server ignores a request's temperature; at 0 it takes the likeliest token
    ends = settings.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    settings.eos_token_id, settings.pad_token_id = sorted(ends | {tokenizer.eos_token_id}), tokenizer.eos_token_id
    known, size = vocabulary_size(tokenizer), model.get_output_embeddings().weight.shape[0]
    if known < size:  # a vocabulary that is rounded up: these ids have no text
        settings.suppress_tokens = list(range(known, size))
    tokenizer.__class__ = _reads_as_generate(type(tokenizer), special=not isinstance(model, RemoeForCausalLM))
    return model.to(device), tokenizer


def _reads_as_generate(kind: type[PreTrainedTokenizerBase], *, special: bool) -> type[PreTrainedTokenizerBase]:
    """The tokenizer's class, but a prompt becomes the tokens that `remoe generate` makes of it."""

    class Tokenizer(kind):
        def __call__(self, text: str, **options: object) -> BatchEncoding:
            # An empty prompt starts a new document; without a token it would end the thread of continuous batching.
            options.setdefault("add_special_tokens", special)
            return super().__call__(text or self.eos_token, **options)

        def apply_chat_template(self, *given: object, **options: object) -> BatchEncoding:
            if self.chat_template is None:
                raise ConfigError("a chat needs a tokenizer with a chat template, and this model's has none")
            return super().apply_chat_template(*given, **options)

    return Tokenizer


@contextmanager
def serving(
    folder: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    continuous_batching: bool = False,
    device: torch.device | None = None,
    gate_threshold: float | None = None,
    max_experts: int | None = None,
) -> Iterator[tuple[str, str]]:
    """Context in which threads answer requests; gives the address of the API and the name of the model.

    Args:
        folder: a run, one of its checkpoints, or the folder of a model; the folder's name is the name of the model.
        host: address to listen on.
        port: to listen on; another free one if it is taken, and any free one for 0.
        continuous_batching: whether requests share forward passes, by transformers' paged attention.
        device: of the model; the CPU by default.
        gate_threshold, max_experts: the model's, for requests without values of their own.

    Raises:
        ExtraError: when a package of the extra `serve` is missing.
        ConfigError: when this version of transformers has another server, or the server does not start; for a gate
            threshold or cap out of range, or of a model without gates.
        CheckpointError: when there is no model, or it cannot be loaded.
        DataError: when its tokenizer cannot be loaded.
    """
    check(bool(host), "an empty host would listen on every network: give an address")
    theirs = _server()
    import uvicorn

    name, port = Path(folder).resolve().name, _free(host, port)
    model, tokenizer = load_served(folder, device or torch.device("cpu"))
    default = set_dial(model, gate_threshold=gate_threshold, max_experts=max_experts)
    with _errors_only():
        manager = _holding(theirs["model_manager"], name, model, tokenizer, continuous_batching)
        running: dict[str, Callable[[], None]] = {}
        state = _state(theirs["utils"], name, running, continuous_batching, model.device, default)
        kinds = {key: getattr(theirs[module], kind) for key, (module, kind) in HANDLERS.items()}
        kinds |= {key: with_dial(kinds[key], model) for key in WRITING}
        handlers = {key: kind(manager, state) for key, kind in kinds.items()}
        app = theirs["server"].build_server(manager, **handlers, generation_state=state)
        app.add_exception_handler(ConfigError, _refuse)
        held = state.get_manager(name, use_cb=continuous_batching).held
        app.add_api_route("/load", lambda: {"requests": len(running), "generating": held()})
        options = {"log_level": "error", "access_log": False, "lifespan": "off", "timeout_keep_alive": KEEP_ALIVE}
        server = uvicorn.Server(uvicorn.Config(Gate(app, host, running), host=host, port=port, **options))
        thread = threading.Thread(target=server.run, name="remoe serve")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise ConfigError(f"cannot listen on {host}, port {port}")
                time.sleep(0.01)
            listening = server.servers[0].sockets[0].getsockname()
            yield f"http://{f'[{host}]' if ':' in host else host}:{listening[1]}/v1", name
        finally:
            server.should_exit = True
            thread.join(GRACE)
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what is cut off now is no error
            server.force_exit = True
            thread.join()
            state.shutdown()
            manager.shutdown()


def _refuse(_: object, error: ConfigError) -> "JSONResponse":
    """Error 400 for a request that cannot be answered, in the form of OpenAI's API."""
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Context in which transformers logs errors alone: its server warns of every request."""
    loggers = [logging.getLogger(name) for name in ("transformers", "ContinuousBatchingLogger")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _holding(
    module: ModuleType, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batching: bool
) -> object:
    """A manager of transformers' server that holds one model, and loads no other."""

    class Held(module.ModelManager):
        def _load_processor(self, name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
            self._only(name)
            return tokenizer

        def _load_model(self, name: str, **_: object) -> PreTrainedModel:
            self._only(name)
            return model

        def _only(self, asked: str) -> None:
            if asked != name:
                raise ValueError(f"this server has the model {name!r} alone, not {asked!r}")

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

    return Held(device=str(model.device), continuous_batching=batching, force_model=name)


def _state(
    module: ModuleType,
    name: str,
    running: dict[str, Callable[[], None]],
    batching: bool,
    device: torch.device,
    default: dict[str, float | int],
) -> object:
    """The state of generation of transformers' server, with managers of ours."""
    from remoe.lab.serving.managers import OneByOne, Together

    state = module.GenerationState(continuous_batching=batching)
    state._generate_managers[name] = OneByOne(running)
    config = ContinuousBatchingConfig(**({} if device.type == "cuda" else CPU_BATCHING))
    state._cb_model_id, state._cb_manager = name, Together(running, config, default)
    return state


def _server() -> dict[str, ModuleType]:
    """The modules of transformers' server, by name.

    Raises:
        ExtraError: when a package of the extra `serve` is missing.
        ConfigError: when this version of transformers has another server.
    """
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra(error, "serve", "remoe serve") from error
    other = ConfigError(f"remoe serve needs the server of transformers 5.24; {transformers.__version__} has another")
    needed = {**NEEDED, **{key: {"model_manager", "generation_state"} for key in HANDLERS.values()}}
    try:
        modules = {module: import_module(f"transformers.cli.serving.{module}") for module, _ in needed}
    except ImportError as error:
        raise other from error
    for (module, name), arguments in needed.items():
        found = getattr(modules[module], name, None)
        if found is None or not arguments <= inspect.signature(found).parameters.keys():
            raise other
    return modules


def _free(host: str, port: int) -> int:
    """The port, or 0, which stands for any free one, if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
            return 0
    return port
