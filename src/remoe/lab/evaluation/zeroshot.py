"""Zero-shot accuracy by EleutherAI's lm-eval harness, on its own tasks or on local Parquet files with the same rows.

The harness scores continuations by their log-probability. Multiple choice: the most likely answer is the model's.
LAMBADA: the last word counts when greedy decoding finds it. Nothing is put before a context, except by the tokenizer;
a context that does not fit into the model's window is cut off at the left.

Importing this module raises ExtraError when lm-eval is not installed.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from remoe.errors import ConfigError, DataError, missing_extra
from remoe.lab.training.load import load_model
from remoe.routing.base import Router

try:
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise missing_extra(error, "eval", "--tasks") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Our name: name in the harness.
TASKS: dict[str, str] = {
    "arc_easy": "arc_easy",
    "arc_challenge": "arc_challenge",
    "boolq": "boolq",
    "hellaswag": "hellaswag",
    "lambada": "lambada_openai",
    "piqa": "piqa",
    "race": "race",
}
GREEDY = ("lambada",)
# As in the harness, tasks with answers of one word, and RACE, have no length-normalised accuracy.
NOT_NORMALIZED = ("boolq", "race")

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass(frozen=True)
class TaskResult:
    """Accuracy on one task, as fractions of its examples.

    Attributes:
        acc: how often the answer with the highest log-probability is right; LAMBADA: the greedy continuation.
        stderr: standard error of `acc`; None for a single example.
        acc_norm: as `acc`, with log-probabilities divided by the answers' lengths in characters; None if not defined.
        acc_norm_stderr: standard error of `acc_norm`.
        chance: expected accuracy of guessing; 0 for LAMBADA.
        examples: number of rows.
        truncated: number of rows that were too long for the model's window.
    """

    acc: float
    stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    chance: float
    examples: int
    truncated: int


class WindowedModel(HFLM):
    """The harness's transformers model, which also takes continuations longer than the model's window.

    Attributes:
        too_long: for each request of the last call, whether it did not fit the window.
    """

    too_long: list[bool]

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # The harness fails at a continuation longer than the window. Scored in pieces of half a window, each of its
        # tokens still has at least half a window (less one token) of context.
        window, piece = self.max_length, max(1, self.max_length // 2)
        parts: list[Request] = []
        owners: list[int] = []
        for i, (texts, context, continuation) in enumerate(requests):
            if len(continuation) <= window:
                split: list[Request] = [(texts, context, continuation)]
            else:
                starts = range(0, len(continuation), piece)
                split = [(None, context + continuation[:at], continuation[at : at + piece]) for at in starts]
            parts += split
            owners += [i] * len(split)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        scores = super()._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm, override_bs=override_bs)
        for i, (score, greedy) in zip(owners, scores, strict=True):
            answers[i] = (answers[i][0] + score, answers[i][1] and greedy)
        # The last token is predicted, never read.
        self.too_long = [len(context) + len(continuation) > window + 1 for _, context, continuation in requests]
        return answers


def parse_tasks(names: str) -> list[str]:
    """The tasks in a list separated by commas, without repetitions.

    Raises:
        ConfigError: for an unknown task, or an empty list.
    """
    asked = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in asked if name not in TASKS]
    if unknown or not asked:
        problem = f"unknown task {unknown[0]!r}" if unknown else "--tasks names no task"
        raise ConfigError(f"{problem}; choose from: {', '.join(TASKS)}")
    return asked


def load_tasks(names: list[str], folder: Path | None) -> dict[str, ConfigurableTask]:
    """Tasks from FOLDER/NAME.parquet, or without a folder the harness's own from the Hugging Face hub.

    Args:
        names: keys of `TASKS`.
        folder: files with the columns context (string), choices (list of strings) and gold (integer, index of the
            right choice). The scored continuation is a space and the choice. LAMBADA has one choice per row. Contexts
            are used unchanged; accuracies are comparable only between equal prompts, and the harness's own begin with
            "Question: " for ARC and PIQA, for example.

    Raises:
        DataError: for a missing or invalid file, or a task that cannot be loaded from the hub.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what this module does on purpose
    if folder is not None:
        return {name: _local_task(name, folder / f"{name}.parquet") for name in names}
    manager = _harness_tasks([TASKS[name] for name in names])
    return {name: _hub_task(name, manager) for name in names}


def _harness_tasks(names: Collection[str]) -> TaskManager:
    """A manager of these tasks of the harness and of those in the same folders; one of all tasks takes 8 s to make."""
    named = re.compile(rf"^task: *({'|'.join(map(re.escape, names))})\s*$".encode(), re.MULTILINE)
    files = Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
    folders = {file.parent for file in files if named.search(file.read_bytes())}
    return TaskManager(include_path=sorted(folders), include_defaults=False)


def _local_task(name: str, path: Path) -> ConfigurableTask:
    rows = datasets.Dataset.from_list(_read_rows(path, greedy=name in GREEDY))
    config: dict = {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "num_fewshot": 0,
        # A function, because the harness would treat a string as a template and a context of digits as a number.
        "doc_to_text": lambda row: row["context"],
    }
    metrics = ["acc"]
    if name in GREEDY:
        config |= {"output_type": "loglikelihood", "doc_to_target": lambda row: " " + row["choices"][0]}
    else:
        config |= {
            "output_type": "multiple_choice",
            "doc_to_target": lambda row: row["gold"],
            "doc_to_choice": lambda row: row["choices"],
            "target_delimiter": " ",
        }
        metrics += [] if name in NOT_NORMALIZED else ["acc_norm"]
    config["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
    return ConfigurableTask(config=config)


def _read_rows(path: Path, *, greedy: bool) -> list[dict]:
    if not path.is_file():
        raise DataError(f"{path} does not exist: --task-data is a folder with a file TASK.parquet for each task")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {_one_line(error)}") from error
    missing = [column for column in ("context", "choices", "gold") if column not in table.column_names]
    if missing or table.num_rows == 0:
        raise DataError(f"{path}: " + (f"has no column {missing[0]!r}" if missing else "has no rows"))
    rows = table.select(["context", "choices", "gold"]).to_pylist()
    for number, row in enumerate(rows):
        if problem := _problem(row, greedy=greedy):
            raise DataError(f"{path}, row {number}: {problem}")
    return rows


def _problem(row: dict, *, greedy: bool) -> str | None:
    context, choices, gold = row["context"], row["choices"], row["gold"]
    if not isinstance(context, str) or not context.strip():
        return "context must be a text"
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        return "choices must be a list of texts"
    if (len(choices) != 1) if greedy else (len(choices) < 2):
        return f"has {len(choices)} choices instead of {'one' if greedy else 'two or more'}"
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        return f"gold must be the index of a choice, not {gold!r}"
    return None


def _hub_task(name: str, manager: TaskManager) -> ConfigurableTask:
    try:
        (task,) = manager.load([TASKS[name]])["tasks"].values()
    except Exception as error:  # the harness, datasets and the hub's client have no common base of errors
        raise DataError(
            f"task {name} cannot be loaded from the Hugging Face hub: {_one_line(error)} "
            "(local files are read with --task-data)"
        ) from error
    task.set_config("num_fewshot", 0)
    return task


def is_causal(model: "PreTrainedModel") -> bool:
    """Whether no token's logits depend on later tokens, including padding.

    With a router that looks ahead, padding changes the accuracies, so sequences must be scored one by one. Even
    then the accuracies are too high, because the score of an answer's first tokens depends on its last ones.
    """
    return all(module.causal for module in model.modules() if isinstance(module, Router))


@dataclass(frozen=True)
class Evaluated:
    """A model's zero-shot accuracies.

    Attributes:
        checkpoint: the folder of its weights.
        tasks: results by name.
        causal: whether no token's logits depend on later ones; if false, the results are not comparable.
        window: the most tokens that it reads at once.
        batch_size: sequences per forward pass; 1 for a model that is not causal.
    """

    checkpoint: Path
    tasks: dict[str, TaskResult]
    causal: bool
    window: int
    batch_size: int

    @property
    def mean_acc(self) -> float:
        """Mean of `acc` over the tasks."""
        return sum(result.acc for result in self.tasks.values()) / len(self.tasks)


def evaluate_model(
    path: str | Path,
    tasks: dict[str, ConfigurableTask],
    *,
    limit: int | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    after: Callable[[str, TaskResult], bool] = lambda name, result: True,
) -> Evaluated:
    """Evaluates the model at `path` on tasks from `load_tasks`.

    Args:
        path: see `load_model`.
        tasks: by name.
        limit: see `evaluate_task`.
        batch_size: sequences per forward pass.
        device: where the model runs.
        after: called with each task's name and result; when it returns false, the remaining tasks are left out.

    Raises:
        CheckpointError, DataError: as `load_model`.
    """
    model, tokenizer, checkpoint = load_model(path)
    causal = is_causal(model)
    harness = WindowedModel(
        pretrained=model.to(device),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size if causal else 1,
        softmax_dtype="float32",  # log-probabilities of a model in bfloat16 would tie
    )
    results = {}
    for name, task in tasks.items():
        results[name] = evaluate_task(harness, name, task, limit=limit)
        if not after(name, results[name]):
            break
    return Evaluated(checkpoint, results, causal, harness.max_length, harness.batch_size)


def evaluate_task(model: WindowedModel, name: str, task: ConfigurableTask, *, limit: int | None = None) -> TaskResult:
    """Evaluates a model on one task, without examples in the context.

    Args:
        model: `WindowedModel(pretrained=..., tokenizer=..., batch_size=...)`.
        name: the task's name, a key of `TASKS`.
        task: from `load_tasks`.
        limit: the most rows, evenly spaced over the task, so that the order of a file (HellaSwag's is by source) does
            not bias the accuracy: row floor(i * rows / limit) for i < limit. All by default.
    """
    rows = len(task.eval_docs)
    picked = None if limit is None or limit >= rows else [i * rows // limit for i in range(limit)]
    task.set_fewshot_seed(0)  # required even though no examples are drawn
    report = evaluate(
        lm=model,
        task_dict={"tasks": {name: task}, "groups": {}},
        samples=None if picked is None else {name: picked},
        bootstrap_iters=0,  # the standard error of a mean of zeros and ones has a closed form
        log_samples=False,
    )["results"][name]
    requests = Counter(request.doc_id for request in task.instances)
    examples = len(requests)
    acc, acc_norm = report["acc,none"], report.get("acc_norm,none")
    cut = {request.doc_id for request, long in zip(task.instances, model.too_long, strict=True) if long}
    return TaskResult(
        acc=acc,
        stderr=_stderr(acc, examples),
        acc_norm=acc_norm,
        acc_norm_stderr=None if acc_norm is None else _stderr(acc_norm, examples),
        chance=0.0 if name in GREEDY else sum(1 / choices for choices in requests.values()) / examples,
        examples=examples,
        truncated=len(cut),
    )


def _stderr(mean: float, count: int) -> float | None:
    return math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
