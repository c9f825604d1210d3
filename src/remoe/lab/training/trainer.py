"""The training loop: batches, loss, controller, optimiser, records, checkpoints.

Each step is a pure function of the state before it and of (seed, step): on the CPU, a resumed run is bit-identical to
an uninterrupted one.

Legend: B sequences of the batch, b of a micro-batch, S sequence length, N validation sequences, L layers, T tokens,
E experts.
"""

import logging
import math
import time

import torch
from torch import Tensor

from remoe.convert.relufy.model import RelufiedMixin, load_relufied
from remoe.errors import CheckpointError, RemoeError
from remoe.lab.analysis.collect import active_of
from remoe.lab.analysis.measures import flip_rate
from remoe.lab.data import Dataset, StreamBatches, ValidationWindows, load_tokenizer
from remoe.lab.machine import peak_memory, used_memory
from remoe.lab.training.build import compiled, enable_recomputation, model_config, wants_bfloat16
from remoe.lab.training.checkpoint import clean, load_training_state, save_checkpoint
from remoe.lab.training.config import TrainConfig
from remoe.lab.training.data import batches_of, state_of
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.interrupt import Interrupt
from remoe.lab.training.lora import adapt, merged_weights, trained_tensors
from remoe.lab.training.mesh import Mesh
from remoe.lab.training.metrics import MetricsWriter, NoMetrics
from remoe.lab.training.optimizer import build_optimizer, learning_rate, stable_end
from remoe.lab.training.origin import Origin
from remoe.lab.training.progress import ProgressLine
from remoe.lab.training.ranks import Ranks
from remoe.lab.training.saving import ShardedSaving
from remoe.lab.training.sharded import build_sharded
from remoe.lab.training.shards import read_model
from remoe.lab.training.speed import Speed
from remoe.lab.training.validate import Evaluation, evaluate, validation_record
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.loss import IGNORED_TARGET
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.models.modes import evaluating
from remoe.models.packing import document_positions
from remoe.models.sharding import local, reshard
from remoe.stages import stage

logger = logging.getLogger(__name__)

ON_SIGNAL = "stopping after this step; a second signal stops at once, without saving"
DEAD_AFTER_STEPS = 100
LAMBDA_TOO_LARGE = 1e3  # of a loss in nats; no run of ours that went well came near


class NonFiniteLoss(RemoeError):
    """The loss or the gradient became NaN or infinite."""


class Trainer:
    """Trains one model in one run's folder.

    Args:
        config: checked options.
        dataset: prepared data.
        run: the run's folder; it must exist by the time that `train` is called.
        ranks: the processes that train the model, each with a trainer of its own; this one alone by default.
        origin: the model that the run starts from; None for random weights.

    Attributes:
        model: a `RemoeForCausalLM`, or a relufied model of transformers, perhaps with adapters.
        shape: the configuration of the model; of a relufied one, its sizes as a `RemoeConfig`.

    Raises:
        ConfigError: for a model that cannot be built, a device that this machine does not have, or too little data.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        run: RunFolder,
        ranks: Ranks | None = None,
        origin: Origin | None = None,
    ) -> None:
        config.check()
        self.config, self.dataset, self.run, self.origin = config, dataset, run, origin
        self.ranks = Ranks(Mesh(), config.device) if ranks is None else ranks
        self.batches = batches_of(dataset, config)
        self.windows = ValidationWindows(dataset.validation, config.seq_len)
        self.device = self.ranks.device
        self.autocast = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=wants_bfloat16(config.dtype, self.device)
        )
        torch.manual_seed(config.seed)
        sharded = self.ranks.count > 1
        self.model = build_sharded(config, dataset, run, self.ranks, origin) if sharded else self._build()
        self.shape = self.model.config if origin is None or not origin.relufied else origin.configured(config)
        self.model.train()
        for router in self.model.sparsity.routers:
            router.global_load = config.mesh_load == "global"
        if config.recompute:
            enable_recomputation(self.model)
        self.forward = compiled(self.model, spread=self.ranks.count > 1) if config.compile else self.model
        self.optimizer = build_optimizer(self.model, config.optim)
        bfloat16 = wants_bfloat16(config.dtype, self.device)
        sizes = config.batch_size, config.seq_len
        self.speed = Speed(self.shape, self.ranks.mesh, self.device, bfloat16, *sizes)
        self.step = 0
        self.saved_step = 0
        self.sparsities: list[float] = []  # S of each step
        self.dead_layers: set[int] = set()
        self.lambda_runs_away = False
        self.stopped_by: int | None = None  # number of the signal that ended `train` before its last step
        self.saving = ShardedSaving(self.ranks, config.checkpoint, self._branching_point) if sharded else None
        self._started, self._seconds_before, self._peak_before = time.perf_counter(), 0.0, 0

    def _build(self) -> RemoeForCausalLM | RelufiedMixin:
        config, dataset = self.config, self.dataset
        if self.origin is None:
            return RemoeForCausalLM(model_config(config, dataset.vocab_size, dataset.eos_token_id)).to(self.device)
        model = self.origin.load(config)
        torch.manual_seed(config.seed)  # however many numbers loading has drawn
        if config.lora.rank:
            adapt(model, config.lora)
        return model.to(self.device)

    def resume(self) -> None:
        """Continues from the newest checkpoint of the run, or from the start when there is none yet.

        Raises:
            CheckpointError: when it cannot be read, or the run was trained on other data.
            DataError: when the data was prepared with another tokenizer.
        """
        self.dataset.check_tokenizer(load_tokenizer(self.run.tokenizer), self.run.path)
        checkpoint = self.run.last_checkpoint(verified=True, ranks=self.ranks)
        if checkpoint is None:
            return
        weights = load_relufied(checkpoint).state_dict() if self._relufied and not self.config.lora.rank else None
        with self.ranks.together():
            info, self.sparsities = load_training_state(checkpoint, self.model, self.optimizer, weights)
        if info["data"] != self.dataset.fingerprint:
            raise CheckpointError(f"{self.dataset.path} is not the data that {self.run.path} was trained on")
        if isinstance(self.batches, StreamBatches):
            self.batches.load_state(info["stream"])
        if self.origin is None:  # a run that 0.1.0 began counts the ids that no token has to its end
            self.model.config.tokenizer_size = RemoeConfig.from_pretrained(checkpoint).tokenizer_size
        self.step = self.saved_step = info["step"]
        self._seconds_before, self._peak_before = info["seconds"], info["peak_memory_bytes"]

    @property
    def _relufied(self) -> bool:
        return isinstance(self.model, RelufiedMixin)

    @property
    def seconds(self) -> float:
        """Time spent on this run in seconds, by earlier processes too, up to their last checkpoints."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that any process of the run has taken: an earlier one may have had the dense stage."""
        return max(self._peak_before, peak_memory(self.device))

    def train(self) -> dict[str, Evaluation] | None:
        """Trains to the last step; returns the final validation, or None when a signal or a closed output stopped it.

        Raises:
            NonFiniteLoss: when the loss or a gradient is not finite; the last checkpoint is untouched.
            CheckpointError: when a checkpoint cannot be written.
        """
        steps = self.config.steps
        metrics = self._metrics_writer() if self.ranks.first else NoMetrics()
        progress = ProgressLine(self.config, self.step)
        validation = None
        try:
            with Interrupt(ON_SIGNAL if self.ranks.first else "") as interrupt:
                while self.step < steps and not (stopped := self.ranks.agree(interrupt.received)):
                    before_LTE = self._routing() if self._measures_flips(self.step + 1) else None
                    record = self._train_step(progress)
                    if self.saving is not None:
                        self.saving.poll()
                    if before_LTE is not None:
                        record["flip_rate"] = flip_rate(before_LTE, self._routing())
                    due = self.step % self.config.validate.every == 0
                    if due or self.step == steps:
                        validation = self.validate(final=self.step == steps)
                        record |= validation_record(validation)
                    if self.step % self.config.log_every == 0 or self.step == steps or due or before_LTE is not None:
                        metrics.write(record)
                    try:
                        progress.show(record, self.step)
                    except OSError:  # `remoe train | head`, a closed terminal, a full disk behind a log file
                        interrupt.output_closed()
                    if self.step % self.config.checkpoint.every == 0 or self.step in (steps, self._branching_point):
                        metrics.flush()
                        self.save()
                if self.saved_step != self.step or steps == 0:  # a signal came between two checkpoints
                    metrics.flush()
                    self.save()
                if self.saving is not None:
                    self.saving.wait()
        finally:
            metrics.close()
            progress.close()
        if self.step < steps:
            self.stopped_by = stopped
            return None
        return validation or self.validate(final=True)

    def _metrics_writer(self) -> MetricsWriter:
        return MetricsWriter(self.run.path, self.step + 1, self.config.log, self.config.to_dict())

    @property
    def _branching_point(self) -> int | None:
        """The last step before the learning rate falls, from which a run can be prolonged; None with other schedules.

        The checkpoint of that step is written, and kept, in any case.
        """
        return stable_end(self.config.steps, self.config.optim) if self.config.optim.schedule == "wsd" else None

    def _train_step(self, progress: ProgressLine) -> dict[str, object]:
        """One optimiser step and its record."""
        config, controller = self.config, self.model.sparsity
        step, start = self.step + 1, time.perf_counter()
        lr = learning_rate(step, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        self.ranks.begin_step(config.seed, step)
        self.speed.start()
        coefficient, opening = controller.coefficient, controller.opening
        losses = self._backward()
        grad_norm = self.ranks.clip(self.model, config.optim.clip)
        self.model.update_routing(lr_fraction=min(1.0, lr / config.optim.lr))  # rounding must not exceed 1
        # The only transfer to the host in a step: all that the record and the checks need.
        scalars = torch.stack([*losses, coefficient, opening, grad_norm, controller.sparsity])
        L, E = controller.load_LE.shape
        values = torch.cat([scalars, controller.dead_steps_L, controller.load_LE.flatten()]).tolist()
        n = len(scalars)
        lm_loss, reg_loss, loss, coefficient, opening, grad_norm, sparsity = values[:n]
        dead_steps_L = values[n : n + L]
        load_LE = [values[first : first + E] for first in range(n + L, len(values), E)]
        if not (math.isfinite(lm_loss + reg_loss) and math.isfinite(grad_norm)):
            raise self._non_finite(step, lm_loss, reg_loss, grad_norm)
        self.optimizer.step()
        self.step = step
        self.sparsities.append(sparsity)
        self._report_dead(dead_steps_L)
        self._report_lambda(coefficient, sparsity)
        tokens = config.batch_size * config.seq_len
        seconds = time.perf_counter() - start
        progress.add(tokens, seconds)
        return {
            "step": step,
            "lm_loss": lm_loss,
            "reg_loss": reg_loss,
            "loss": loss,
            "lambda": coefficient,
            "opening": opening,
            "sparsity": sparsity,
            "stage": stage(sparsity, controller.target),
            "sparsity_per_layer": [1 - sum(load_E) / len(load_E) for load_E in load_LE],
            "load_per_expert": load_LE,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": step * tokens,
            "tokens_per_second": tokens / seconds,
            "memory_bytes": used_memory(self.device),
            **self.speed.record(seconds, sparsity),
        }

    def _batch(self) -> tuple[Tensor, Tensor, int]:
        """This rank's rows of the next batch: inputs and targets, (B, S) each; and the targets of the whole batch."""
        config = self.config
        rows = self.ranks.rows(config.batch_size, config.micro_batch_size)
        token_BS, mask_BS = self.batches.batch(self.step, rows), self.batches.target_mask(self.step, rows)
        if self.device.type == "cuda":
            token_BS = token_BS.pin_memory()  # otherwise the copy synchronises with the device
        token_BS = token_BS.to(self.device, non_blocking=True)
        input_BS, target_BS = token_BS[:, :-1], token_BS[:, 1:]
        if mask_BS is None:
            return input_BS, target_BS, config.batch_size * config.seq_len
        whole_BS = self.batches.target_mask(self.step)
        target_BS = target_BS.masked_fill(~mask_BS.to(self.device), IGNORED_TARGET)
        return input_BS, target_BS, max(1, int(whole_BS.sum()))

    def _backward(self) -> Tensor:
        """Accumulates the gradients of this rank's rows of the next batch.

        Returns the language model's loss, regulariser and total loss of the whole batch, (3,) float32.
        """
        config = self.config
        input_BS, target_BS, items = self._batch()
        tokens = config.batch_size * config.seq_len
        share = {} if items == tokens or self._relufied else {"num_tokens_in_batch": tokens}
        losses = torch.zeros(3, device=self.device)
        parts = (tensor.split(config.micro_batch_size) for tensor in (input_BS, target_BS))
        for input_bS, target_bS in zip(*parts, strict=True):
            positions_bS = document_positions(input_bS, self.dataset.eos_token_id) if config.mask_documents else None
            target_bS = target_bS.contiguous()
            with self.autocast:
                out = self.forward(
                    input_bS,
                    position_ids=positions_bS,
                    labels=target_bS,  # for models of transformers, which take shifted ones beside them
                    shift_labels=target_bS,
                    num_items_in_batch=items,
                    use_cache=False,
                    **share,
                )
            self.ranks.backward(out.loss)
            self.model.sparsity.carry_load(out.routings)
            losses = losses + torch.stack([out.lm_loss, out.reg_loss, out.loss]).detach()
        return self.ranks.sum(losses)

    def validate(self, final: bool) -> dict[str, Evaluation]:
        """Evaluation of each domain: on all tokens when final, otherwise on a prefix of each domain."""
        options = self.config.validate
        limit = None if final else options.max_tokens
        return evaluate(
            self.model,
            self.windows,
            batch_size=options.batch_size,
            max_tokens=limit,
            autocast=self.autocast,
            ranks=self.ranks,
            document_end=self.dataset.eos_token_id if self.config.mask_documents else None,
        )

    def _measures_flips(self, step: int) -> bool:
        every = self.config.validate.flips_every
        return every > 0 and step % every == 0 and self.shape.routes_pairs

    def _routing(self) -> Tensor:
        """(L, T, E) bool: how the present weights route the first validation tokens, equally many of each domain."""
        sequences = self.config.validate.flips_tokens / (self.config.seq_len * len(self.windows.domains))
        firsts = [next(self.windows.batches(domain, math.ceil(sequences))) for domain in self.windows.domains]
        input_NS, mask_NS = (torch.cat([first[column] for first in firsts]) for column in (0, 2))
        with evaluating(self.model):
            return active_of(self.model, input_NS, mask_NS, self.autocast)

    def save(self) -> None:
        """Writes a checkpoint of the current step, and deletes those that need not be kept; see `ShardedSaving`."""
        reshard(self.model)
        finite = all(torch.isfinite(local(parameter)).all() for parameter in self.model.parameters())
        if self.ranks.agree(int(not finite)):
            raise NonFiniteLoss(f"step {self.step}: weights are not finite, not saved; {self._last_checkpoint()}")
        self.ranks.check_equal(self.model.buffers(), f"step {self.step}: lambda, S or the state of a router")
        info = {
            "data": self.dataset.fingerprint,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            **state_of(self.batches, self.ranks),
        }
        folder, state = self.run.checkpoints, (self.model, self.optimizer, info, self.sparsities)
        if self.saving is not None:
            self.saving.start(folder, self.step, *state)
        else:
            save_checkpoint(folder, self.step, *state, **self._adapted())
            clean(folder, self.step, self.config.checkpoint, self._branching_point)
        self.saved_step = self.step

    def _adapted(self) -> dict[str, dict[str, Tensor]]:
        """What `save_checkpoint` is given besides for a model with adapters."""
        if not self.config.lora.rank:
            return {}
        return {"merged": merged_weights(self.model), "trained": trained_tensors(self.model)}

    def whole_model(self) -> RemoeForCausalLM:
        """The trained model in this process alone; read from the last checkpoint where it is sharded over several."""
        if self.ranks.count == 1:
            return self.model
        return read_model(self.run.last_checkpoint()).to(self.device)

    def _non_finite(self, step: int, lm_loss: float, reg_loss: float, grad_norm: float) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"step {step}: not finite: lm_loss = {lm_loss:g}, reg_loss = {reg_loss:g}, grad_norm = {grad_norm:g}; "
            f"training stopped before the update and overwrote nothing; {self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        if self.saving is not None:
            self.saving.wait()
        last = self.run.last_checkpoint() if self.saved_step else None
        return f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"

    def _report_dead(self, dead_steps_L: list[float]) -> None:
        dead = {layer for layer, count in enumerate(dead_steps_L) if count >= DEAD_AFTER_STEPS}
        if new := sorted(dead - self.dead_layers):
            logger.warning("step %d: no token was routed for %d steps in layers %s", self.step, DEAD_AFTER_STEPS, new)
        self.dead_layers = dead

    def _report_lambda(self, coefficient: float, sparsity: float) -> None:
        if self.shape.steered and coefficient > LAMBDA_TOO_LARGE and not self.lambda_runs_away:
            logger.warning(
                "step %d: lambda is %.1e and S %.4f, for a target of %.4g: the penalty no longer controls the experts "
                "that are still active", self.step, coefficient, sparsity, self.model.sparsity.target,
            )  # fmt: skip
            self.lambda_runs_away = True
