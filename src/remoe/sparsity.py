"""Steering sparsity: the coefficient lambda of the L1 penalty, moved once per optimiser step.

Sign rule: arXiv 2412.14711, Eq. 7 and 8. The smooth rule is ours; `docs/architecture.md` gives its reasons.

Legend: L layers, T tokens, E experts.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remoe.errors import ConfigError
from remoe.routing.assignment import Routing
from remoe.routing.base import keep_float32

if TYPE_CHECKING:
    from remoe.layer import MoE

RULES = ("sign", "official", "smooth", "none")

# The smooth rule averages the error of log density exponentially, with this weight on the newest: batches differ.
# Then: step of log lambda per unit of the mean error, and per unit of its change; and the bound of a step.
SMOOTH_AVERAGE = 0.3
SMOOTH_GAIN = 0.4
SMOOTH_DAMPING = 2.0
SMOOTH_MAX_STEP = math.log(1.5)
# It lets lambda fall no lower: a penalty so small does nothing, and experts that open again find lambda near.
SMOOTH_LAMBDA_MIN = 1e-8
# The fast start sets lambda * L_reg to this at the first update, in units of the task's loss.
FAST_START_PENALTY = 3e-3
# Keeps lambda a normal float32 number, from which it can rise again.
LAMBDA_MIN, LAMBDA_MAX = 1e-30, 1e30
DEAD_AFTER_STEPS = 100
# Weight of the Switch loss (arXiv 2101.03961, section 2.2).
SWITCH_COEFFICIENT = 0.01
UNKNOWN = -1.0


class SparsityController(nn.Module):
    """Holds lambda and moves it so that the sparsity S (Eq. 8) reaches 1 - k/E.

    Add `penalty` to the loss, call `observe` with each micro-batch's routings and `update` once per optimiser step; for
    routers that lambda does not steer too: it then measures, and moves what they steer themselves. Everything that a
    resumed run needs is in the state dict, float32 even when the model is cast to another dtype.

    Args:
        num_layers: L.
        num_experts: E of each layer (times granularity).
        k: wanted mean of active experts per token (times granularity).
        rule: "sign": lambda *= alpha ** sign(target - S), Eq. 7. "official": the same, but S equal to the target
            counts as too sparse, as in the authors' code. "smooth": a step of log lambda proportional to the averaged
            error of the log density, damped by its change and bounded; lambda stays above 1e-8, or where it started
            below that. "none": lambda stays; S is only measured.
        lambda_init: lambda_0.
        alpha: factor of the sign rules, above 1.
        fast_start: at the first update, raise lambda to where the penalty is 0.003 in units of the loss (nats, for a
            language model): the dense stage, in which a tiny lambda grows unnoticed, is left out. From random weights
            that costs loss (docs/results.md): experts close before they have learned. Without effect for rule "none"
            and for k = E.
        sum_layers: the loss adds the layers' regularisers up instead of taking their mean; for `fast_start` only.

    Attributes:
        lam: 0-dim float32 buffer, lambda.
        sparsity: 0-dim float32, S of the last update, -1 before the first.
        dead_steps_L: (L,) float32, updates in a row in which a layer had no pair.
        load_LE: (L, E) float32, share of the tokens routed to each expert at the last update.
        statistic_LE: (L, E) float32, mean of the routings' `statistic_E` at the last update, for `Router.update_state`.
        penalised: whether a training loss since the last update has the penalty in it, as the model says that makes it.

    Raises:
        ConfigError: for an unknown rule, no layers, k not in 1..E, lambda_init <= 0 or alpha <= 1.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        k: int,
        *,
        rule: str = "sign",
        lambda_init: float = 1e-8,
        alpha: float = 1.2,
        fast_start: bool = False,
        sum_layers: bool = False,
    ) -> None:
        super().__init__()
        if rule not in RULES:
            raise ConfigError(f"unknown sparsity rule {rule!r}; choose one of: {', '.join(RULES)}")
        if num_layers < 1:
            raise ConfigError(f"num_layers must be at least 1, but is {num_layers}")
        if not 1 <= k <= num_experts:
            raise ConfigError(f"k must be between 1 and the number of experts, but k = {k} and E = {num_experts}")
        if not (0 < lambda_init < math.inf and 1 < alpha < math.inf):
            raise ConfigError(f"need finite lambda_init > 0 and alpha > 1, but they are {lambda_init} and {alpha}")
        self.num_experts = num_experts
        self.rule = rule
        self.target_density = k / num_experts
        self.log_alpha = math.log(alpha)
        smooth_min = max(LAMBDA_MIN, min(SMOOTH_LAMBDA_MIN, lambda_init))
        self.lambda_min = smooth_min if rule == "smooth" else LAMBDA_MIN
        self.fast_start = fast_start and rule != "none" and k < num_experts
        self.sum_layers = sum_layers
        self.lambda_init = float(lambda_init)
        self.penalised = False

        def state(name: str, value: Tensor, persistent: bool = True) -> None:
            self.register_buffer(name, value, persistent=persistent)

        # Said, because transformers builds a model under its own default dtype.
        state("lam", torch.tensor(self.lambda_init, dtype=torch.float32))
        state("sparsity", torch.tensor(UNKNOWN, dtype=torch.float32))
        state("mean_error", torch.tensor(0.0, dtype=torch.float32))
        state("dead_steps_L", torch.zeros(num_layers, dtype=torch.float32))
        for name, value in self._no_statistics(num_layers).items():
            state(name, value, persistent=False)

    def _no_statistics(self, num_layers: int) -> dict[str, Tensor]:
        """Buffers that are not saved: the load at the last update, and the sums since then."""
        shape = (num_layers, self.num_experts)
        return {
            "load_LE": torch.zeros(shape, dtype=torch.float32),
            "statistic_LE": torch.zeros(shape, dtype=torch.float32),
            "_statistic_LE": torch.zeros(shape, dtype=torch.float32),
            "_pairs_LE": torch.zeros(shape, dtype=torch.int64),
            "_tokens_L": torch.zeros(num_layers, dtype=torch.int64),
            "_regularizer_sum": torch.zeros((), dtype=torch.float32),
            "_passes": torch.zeros((), dtype=torch.int64),
        }

    def statistics(self) -> list[str]:
        """Names of the buffers that each rank fills by itself until `update`."""
        return [name for name in self._no_statistics(1) if name[0] == "_"]

    @torch.no_grad()
    def reset(self) -> None:
        """As at the start; needed where a loader leaves buffers undefined that it finds no values for.

        Where transformers loads a model, it guards torch's initialisers: what has been loaded is left alone.
        """
        nn.init.constant_(self.lam, self.lambda_init)
        nn.init.constant_(self.sparsity, UNKNOWN)
        nn.init.zeros_(self.mean_error)
        nn.init.zeros_(self.dead_steps_L)
        for name, value in self._no_statistics(len(self.dead_steps_L)).items():
            setattr(self, name, value.to(self.lam.device))

    @property
    def target(self) -> float:
        """The wanted sparsity, 1 - k/E."""
        return 1 - self.target_density

    @property
    def sparsity_L(self) -> Tensor:
        """(L,) float32, sparsity of each layer at the last update."""
        return 1 - self.load_LE.mean(dim=1)

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Adds the statistics of one forward pass, one routing per layer.

        A forward pass that recomputes activations inside a backward pass is not counted again.

        Args:
            routings: L of them, of layers with E experts.

        Raises:
            ConfigError: for another number of layers or experts.
        """
        L, E = self.load_LE.shape
        if len(routings) != L or any(routing.count_E.shape[0] != E for routing in routings):
            sizes = ", ".join(str(routing.count_E.shape[0]) for routing in routings)
            raise ConfigError(f"observe needs a routing of {E} experts for each of {L} layers, but got: {sizes}")
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self._pairs_LE += self._stacked(routings, "count_E")
        self._tokens_L += self._stacked(routings, "num_tokens")
        regularizer_L = self._stacked(routings, "regularizer")
        self._regularizer_sum += regularizer_L.sum() if self.sum_layers else regularizer_L.mean()
        if routings[0].statistic_E is not None:
            self._statistic_LE += self._stacked(routings, "statistic_E")
        self._passes += 1

    def _stacked(self, routings: Sequence[Routing], name: str) -> Tensor:
        return torch.stack([getattr(routing, name).to(self.lam.device) for routing in routings])

    def penalty(
        self, layers: "Sequence[MoE]", routings: Sequence[Routing], coefficient: float = SWITCH_COEFFICIENT
    ) -> Tensor:
        """What a training loss has besides the task's, in its units.

        lambda times the mean over layers of the regulariser, where lambda steers the routers (arXiv 2412.14711, Eq. 6);
        else `coefficient` times the sum over layers; and what routers add by themselves.

        Args:
            layers: the L layers of one model, all with one kind of router.
            routings: what they returned, in the same order.
            coefficient: of the load-balancing loss of "topk" and "sparsemixer"; the others have none.

        Returns:
            0-dim float32.
        """
        self.penalised = True
        regularizer_L = self._stacked(routings, "regularizer")
        if layers[0].router.steered:  # a copy of lambda: `update` changes it in place
            total = self.lam.clone() * (regularizer_L.sum() if self.sum_layers else regularizer_L.mean())
        else:
            total = coefficient * regularizer_L.sum()
        return total if routings[0].extra_loss is None else total + self._stacked(routings, "extra_loss").mean()

    @torch.no_grad()
    def update(self, layers: "Sequence[MoE]" = (), group: dist.ProcessGroup | None = None) -> None:
        """Moves lambda by the statistics since the last call, summed over all ranks, and starts new ones.

        Without any token since the last call nothing changes. No host synchronisation.

        Args:
            layers: those whose routings were observed, in the same order: what their routers steer by themselves
                ("sigmoid", "expert_choice", "threshold") moves too. "relu" has nothing of the kind.
            group: ranks to sum over, when torch.distributed is initialised; all of them by default.
        """
        self.penalised = False
        sums = (self._pairs_LE, self._tokens_L, self._regularizer_sum, self._passes, self._statistic_LE)
        if dist.is_available() and dist.is_initialized():
            for tensor in sums:
                dist.all_reduce(tensor, group=group)
        pairs_LE, tokens_L, *_ = sums
        seen = tokens_L.sum() > 0
        slots = (tokens_L.sum() * self.num_experts).clamp(min=1)
        exact = torch.float32 if slots.device.type == "mps" else torch.float64  # MPS has no float64
        density = (pairs_LE.sum().to(exact) / slots).float()

        step, mean_error = self._log_step(density)
        lam = self.lam * step.exp()
        if self.fast_start:
            penalty = self._regularizer_sum / self._passes.clamp(min=1)
            first = (self.sparsity == UNKNOWN) & (penalty > 0)
            lam = torch.where(first, torch.maximum(lam, FAST_START_PENALTY / penalty), lam)
        self.lam.copy_(torch.where(seen, lam.clamp(self.lambda_min, LAMBDA_MAX), self.lam))
        self.sparsity.copy_(torch.where(seen, 1 - density, self.sparsity))
        self.mean_error.copy_(torch.where(seen, mean_error, self.mean_error))
        self.load_LE.copy_(torch.where(seen, pairs_LE / tokens_L.clamp(min=1)[:, None], self.load_LE))
        mean_LE = self._statistic_LE / self._passes.clamp(min=1)
        self.statistic_LE.copy_(torch.where(seen, mean_LE, self.statistic_LE))
        no_pair_L = (pairs_LE.sum(dim=1) == 0) & (tokens_L > 0)
        counted_L = torch.where(no_pair_L, self.dead_steps_L + 1, 0.0)
        self.dead_steps_L.copy_(torch.where(tokens_L > 0, counted_L, self.dead_steps_L))
        for tensor in sums:
            tensor.zero_()
        for layer, load_E, statistic_E in zip(layers, self.load_LE, self.statistic_LE, strict=bool(layers)):
            layer.router.step(load_E, statistic_E, seen)

    def _log_step(self, density: Tensor) -> tuple[Tensor, Tensor]:
        """0-dim each: the step of log lambda, and the averaged error of log density."""
        floor = self.target_density / 100  # an empty batch is very sparse, not infinitely so
        error = (density.clamp(min=floor) / self.target_density).log()  # positive: too dense, lambda must rise
        last = torch.where(self.sparsity == UNKNOWN, error, self.mean_error)
        mean = last + SMOOTH_AVERAGE * (error - last)
        if self.rule == "smooth":
            step = SMOOTH_GAIN * mean + SMOOTH_DAMPING * (mean - last)
            return step.clamp(-SMOOTH_MAX_STEP, SMOOTH_MAX_STEP), mean
        sign = torch.sign(density - self.target_density)
        if self.rule == "official":
            sign = torch.where(sign > 0, 1.0, -1.0)
        return sign * (0.0 if self.rule == "none" else self.log_alpha), mean

    def dead_layers(self) -> list[int]:
        """Layers without a pair for 100 updates in a row. Synchronises with the host."""
        return (self.dead_steps_L >= DEAD_AFTER_STEPS).nonzero().flatten().tolist()

    def _apply(self, fn, recurse: bool = True) -> "SparsityController":
        """Moves to devices as any module, but keeps the state in float32 with its full value."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        keep_float32(self, before)
        return self

    def extra_repr(self) -> str:
        return f"rule={self.rule}, target={self.target:.4g}"
