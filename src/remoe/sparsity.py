"""Sparsity control: lambda, the coefficient of the L1 penalty, moved once per optimiser step; and the loss (Eq. 6).

Equations are those of arXiv 2412.14711. The smooth rule is ours; `docs/architecture.md` gives its reasons.

Legend: L layers, T tokens, E experts of a layer (E G with granularity G), k target experts per token (k G).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remoe.errors import ConfigError, check, check_choice, check_integers, check_numbers
from remoe.routing.assignment import Routing
from remoe.routing.base import Router
from remoe.routing.float32 import Float32State

if TYPE_CHECKING:
    from remoe.layer import MoE

RULES = ("sign", "official", "smooth", "none")
NORMALIZATIONS = ("paper", "official")

# The smooth rule; docs/architecture.md, "Sparsity control", has what each was measured against.
SMOOTH_AVERAGE = 0.3  # weight of the newest batch in the averaged density, because batches differ
SMOOTH_GAIN, SMOOTH_GAIN_CLOSED = 0.9, 0.65  # step of log lambda per unit of the error, up and down
SMOOTH_DAMPING = 4.5  # and per unit of its change
SMOOTH_MAX_STEP = math.log(1.5)  # of both together, and of the first alone
SMOOTH_LAMBDA_MIN = 1e-8
SMOOTH_IDLE_PENALTY = 3e-4  # lambda * L_reg, in units of the task's loss, below which lambda rises by largest steps
SMOOTH_OPENING, SMOOTH_SPARSER = 64.0, 0.02  # `opening` per (k/E)^3 and unit of density that lacks to 98 % of k/E
SMOOTH_MAX_OPENING = 0.054  # per k/E
FAST_START_PENALTY = 3e-3  # lambda * L_reg after the first update, in units of the task's loss
LAMBDA_MIN, LAMBDA_MAX = 1e-30, 1e30  # normal float32 numbers, from which lambda can come back
AUX_LOSS_COEF = 0.01  # of the Switch loss (arXiv 2101.03961, section 2.2)
UNKNOWN = -1.0


def sparsity(pairs_LE: Tensor, tokens_L: Tensor) -> Tensor:
    """S, 0-dim float64 (float32 on MPS), from routed pairs per expert and tokens per layer; 1 without tokens."""
    exact = torch.float32 if pairs_LE.device.type == "mps" else torch.float64
    LTE = (tokens_L.sum() * pairs_LE.shape[1]).clamp(min=1)
    return 1 - pairs_LE.sum().to(exact) / LTE  # Eq. 8: S = 1 - 1/(L T E) sum 1{R > 0}


def normal_quantile(p: Tensor) -> Tensor:
    """Where the standard normal distribution function is p; by erfinv, which all of torch's devices have."""
    return math.sqrt(2) * torch.erfinv(2 * p - 1)


def sign_rule(S: Tensor, target: float, alpha: float) -> Tensor:
    """What the paper multiplies lambda by: alpha while too many experts are active, 1/alpha while too few."""
    return alpha ** torch.sign(target - S)  # Eq. 7: lambda_{i+1} = lambda_i alpha^sign((1 - k/E) - S_i)


class LossTerms(NamedTuple):
    """What a loss has besides the task's, 0-dim float32 each: `total` = coefficient * regularizer + extra.

    `coefficient` is lambda, or the constant of routers that lambda does not steer; `regularizer` is L_reg over all
    layers; `extra` is what routers add with a weight of their own, averaged over layers, and with the smooth rule
    `opening` times the layers' mean `closed_loss`.
    """

    regularizer: Tensor
    coefficient: Tensor
    extra: Tensor
    total: Tensor


class SparsityController(Float32State):
    """Holds lambda and moves it so that the sparsity S (Eq. 8) reaches 1 - k/E; `of` makes one for layers.

    Add `loss_terms(routings).total` to the loss, call `observe` with the routings of each micro-batch, and `update`
    once per optimiser step, whichever the router: if lambda does not steer it, the controller measures, and `update`
    moves the router's own state. The state dict is float32 whatever the model's dtype.

    Args:
        num_layers, num_experts, k: L, E, and the target number of experts per token, a mean.
        rule: "sign" (Eq. 7). "official": the same, but S equal to the target counts as too sparse, as in the authors'
            code. "smooth": a step of log lambda proportional to the error of the averaged density, damped, and bounded
            in proportion to the learning rate; lambda stays at or above 1e-8, or its start if that is lower; while the
            density 1 - S is more than 2 % below k/E, closed experts are opened (`opening`), and with a balanced
            penalty, at any S, those with less than a quarter of their share (`routing.regularizers.starved_loss`).
            "none": lambda stays; S is only measured.
        lambda_init, alpha: lambda_0, and the factor of the sign rules, above 1.
        fast_start: at the first update, raise lambda to where the penalty is 0.003 in units of the loss. That leaves
            out the dense stage, which costs loss when training from random weights (docs/results.md).
        regularizer_normalization: "paper": L_reg is the mean over layers; "official": the sum, as in the authors'
            code, where lambda is L times smaller at equal penalty.
        router_aux_loss_coef: coefficient of the regulariser, summed over layers, if lambda does not steer the routers.
        layers: see `of`, which passes them; without layers, `update` moves lambda alone, and nothing opens experts.

    Attributes:
        lam, sparsity: 0-dim float32, lambda, and S of the last update, -1 before the first.
        mean_error: 0-dim float32, error of the averaged density 1 - S, in standard deviations of the logits if they are
            normally distributed; positive where too many experts are active.
        dead_steps_L: (L,) float32, updates in a row in which a layer had no pair.
        load_LE, statistic_LE: (L, E) float32, of the last update: share of the tokens routed to each expert, and mean
            of the routings' `statistic_E`.
        penalised: True once `loss_terms` was called in training mode since the last update.

    Raises:
        ConfigError: for unknown names, no layers, k not in 1..E, lambda_init <= 0 or alpha <= 1.
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
        regularizer_normalization: str = "paper",
        router_aux_loss_coef: float = AUX_LOSS_COEF,
        layers: "Sequence[MoE | Router]" = (),
    ) -> None:
        super().__init__()
        check_choice("sparsity rule", rule, RULES)
        check_choice("regularizer_normalization", regularizer_normalization, NORMALIZATIONS)
        check_integers(1, num_layers=num_layers, num_experts=num_experts, k=k)
        check(1 <= k <= num_experts, f"k must be between 1 and E, but k = {k} and E = {num_experts}")
        check_numbers(0, lambda_init=lambda_init, alpha=alpha, router_aux_loss_coef=router_aux_loss_coef)
        check(lambda_init > 0 and alpha > 1, f"need lambda_init > 0 and alpha > 1, not {lambda_init} and {alpha}")
        self.layers = tuple(layers)  # a tuple, so that their parameters are not this module's too
        self.steered = all(router.steered for router in self.routers)
        self.num_experts, self.target_density = num_experts, k / num_experts
        self.rule, self.alpha, self.lambda_init = rule if self.steered else "none", alpha, float(lambda_init)
        smooth_min = max(LAMBDA_MIN, min(SMOOTH_LAMBDA_MIN, lambda_init))
        self.lambda_min = smooth_min if self.rule == "smooth" else LAMBDA_MIN
        for router in self.routers:
            router.opens = self.rule == "smooth"
        self.fast_start = fast_start and self.rule != "none" and k < num_experts
        self.sum_layers = regularizer_normalization == "official" or not self.steered
        self.router_aux_loss_coef = router_aux_loss_coef
        self.penalised = False
        L, LE = (num_layers,), (num_layers, num_experts)
        saved = {"lam": (), "sparsity": (), "mean_error": (), "dead_steps_L": L}
        last = {"load_LE": LE, "statistic_LE": LE}
        sums = {"_statistic_LE": LE, "_pairs_LE": LE, "_tokens_L": L, "_regularizer_sum": (), "_passes": ()}
        for name, shape in (saved | last | sums).items():
            # The dtype is given, because transformers builds a model under its own default dtype.
            dtype = torch.int64 if name in ("_pairs_LE", "_tokens_L", "_passes") else torch.float32
            self.register_buffer(name, torch.zeros(shape, dtype=dtype), persistent=name in saved)
        self.reset()

    @classmethod
    def of(cls, layers: "Sequence[MoE | Router]", **options: Any) -> "SparsityController":
        """The controller of all layers of one model, in the order of their routings.

        The layers (or their routers) know sizes, k, granularity and steering. `options` are those of the class. Layers
        of several kinds raise a ConfigError.
        """
        layers = tuple(layers)
        check(bool(layers), "a controller needs at least one layer")
        routers = [layer if isinstance(layer, Router) else layer.router for layer in layers]
        kinds = {(type(router), router.num_experts, router.k) for router in routers}
        check(len(kinds) == 1, f"a controller is for layers of one kind, but these are of {len(kinds)} kinds")
        router = routers[0]
        E, k = (router.num_experts, router.k) if router.routes_pairs else (1, 1)
        return cls(len(routers), E, k, layers=layers, **options)

    @property
    def routers(self) -> list[Router]:
        """The routers of the layers that the controller was made for."""
        return [layer if isinstance(layer, Router) else layer.router for layer in self.layers]

    @property
    def target(self) -> float:
        """The target sparsity, 1 - k/E."""
        return 1 - self.target_density

    @property
    def coefficient(self) -> Tensor:
        """What multiplies the regulariser, 0-dim float32: a copy of lambda, or the constant."""
        return self.lam.clone() if self.steered else torch.full_like(self.lam, self.router_aux_loss_coef)

    @property
    def opening(self) -> Tensor:
        """0-dim float32, at most 0.054 k/E: what multiplies the mean `closed_loss`; zero but with the smooth rule.

        No penalty can open experts that closed on their own, as they do with few experts and small batches.
        """
        if self.rule != "smooth":
            return torch.zeros_like(self.lam)
        target = self.target_density
        missing = target * (1 - SMOOTH_SPARSER) - self._mean_density()
        return target * (SMOOTH_OPENING * target**2 * missing).clamp(0, SMOOTH_MAX_OPENING)

    def regularizer(self, routings: Sequence[Routing]) -> Tensor:
        """L_reg, 0-dim float32: the mean of the layers' regularisers (Eq. 9, 11), or their sum; one routing a layer."""
        self.keep_float32()
        L = self.load_LE.shape[0]
        check(len(routings) == L, f"a routing is needed for each of {L} layers, but {len(routings)} were given")
        total = self._stacked(routings, "regularizer").sum()
        return total if self.sum_layers else total / len(routings)

    def loss_terms(self, routings: Sequence[Routing], share: Tensor | float = 1.0) -> LossTerms:
        """The terms that a loss has besides the task's: lambda * L_reg, and in training mode what routers add.

        Args:
            routings: one per layer, of one forward pass.
            share: of these tokens in the optimiser step, so that the terms of its micro-batches add up.
        """
        if self.training:  # without a look at the old value, which a compiled graph would depend on
            self.penalised = True
        share = share.to(self.lam.device) if isinstance(share, Tensor) else share
        L_reg, lam, extra = self.regularizer(routings) * share, self.coefficient, self.lam.new_zeros(())
        total = lam * L_reg  # Eq. 6: L = L_lm + lambda_i L_reg
        if self.training and routings[0].extra_loss is not None:
            extra = self._stacked(routings, "extra_loss").mean() * share
        if self.training and routings[0].closed_loss is not None:
            extra = extra + self.opening * self._stacked(routings, "closed_loss").mean() * share
        total = total + extra
        return LossTerms(L_reg, lam, extra, total)

    @torch.no_grad()
    def observe(self, routings: Sequence[Routing]) -> None:
        """Adds the statistics of a forward pass, not of a recomputed one; ConfigError unless one routing a layer."""
        L, E = self.load_LE.shape
        if len(routings) != L or any(routing.count_E.shape[0] != E for routing in routings):
            sizes = ", ".join(str(routing.count_E.shape[0]) for routing in routings)
            raise ConfigError(f"observe needs a routing of {E} experts for each of {L} layers, but got: {sizes}")
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self._pairs_LE += self._stacked(routings, "count_E")
        self._tokens_L += self._stacked(routings, "num_tokens")
        self._regularizer_sum += self.regularizer(routings)
        if routings[0].statistic_E is not None:
            self._statistic_LE += self._stacked(routings, "statistic_E")
        self._passes += 1

    @torch.no_grad()
    def carry_load(self, routings: Sequence[Routing]) -> None:
        """Has routers with `global_load` count the load of a micro-batch in the later ones of its step too.

        Call it after the backward pass, in which a recomputed forward must find what the first one found.
        """
        for router, routing in zip(self.routers, routings, strict=bool(self.layers)):
            if router.global_load:
                load_E = routing.count_E if routing.load_E is None else routing.load_E
                load_E1 = torch.cat((load_E, routing.num_tokens.reshape(1)))
                router.earlier_load = load_E1 if router.earlier_load is None else router.earlier_load + load_E1

    @torch.no_grad()
    def update(self, group: dist.ProcessGroup | None = None, *, lr_fraction: float = 1.0) -> None:
        """Moves lambda, and every router's own state, by the statistics since the last call; no host sync.

        Without any token since then nothing changes. If torch.distributed is initialised, statistics are summed over
        the ranks of `group`, by default all. `lr_fraction`, 0 to 1, is the step's learning rate over the peak of its
        schedule: the smooth rule's largest step is in proportion to it, because S does not answer where routers can
        hardly move, and lambda would rise far too high; and it averages over more batches where it is low.
        """
        check(0 <= lr_fraction <= 1, f"lr_fraction must be between 0 and 1, but is {lr_fraction}")
        if dist.is_available() and dist.is_initialized():  # one collective; float64 holds counts exactly up to 2^53
            sums = [getattr(self, name) for name in self.statistics()]
            dist.all_reduce(total := torch.cat([tensor.flatten().double() for tensor in sums]), group=group)
            for tensor, part in zip(sums, total.split([tensor.numel() for tensor in sums]), strict=True):
                tensor.copy_(part.view_as(tensor))
        pairs_LE, tokens_L, passes = self._pairs_LE, self._tokens_L, self._passes.clamp(min=1)
        seen, S = tokens_L.sum() > 0, sparsity(pairs_LE, tokens_L)
        L_reg = self._regularizer_sum / passes
        factor, mean_error = self._factor(S, self.lam * L_reg, lr_fraction)
        lam = self.lam * factor
        if self.fast_start:
            first = (self.sparsity == UNKNOWN) & (L_reg > 0)
            lam = torch.where(first, torch.maximum(lam, FAST_START_PENALTY / L_reg), lam)
        dead_L = (self.dead_steps_L + 1) * (pairs_LE.sum(dim=1) == 0)
        new = {
            "lam": lam.clamp(self.lambda_min, LAMBDA_MAX),
            "sparsity": S.float(),
            "mean_error": mean_error,
            "dead_steps_L": torch.where(tokens_L > 0, dead_L, self.dead_steps_L),
            "load_LE": pairs_LE / tokens_L.clamp(min=1)[:, None],
            "statistic_LE": self._statistic_LE / passes,
        }
        for name, value in new.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.where(seen, value, buffer))
        self.discard_statistics()
        for router, load_E, statistic_E in zip(self.routers, self.load_LE, self.statistic_LE, strict=bool(self.layers)):
            router.step(load_E, statistic_E, seen)

    def _factor(self, S: Tensor, penalty: Tensor, lr_fraction: float) -> tuple[Tensor, Tensor]:
        """0-dim float32 each: what lambda is multiplied by, and `mean_error`."""
        # Routers at a low learning rate leave the time to average over more batches, and so to trust smaller errors.
        pace, density = math.sqrt(lr_fraction), (1 - S).float()
        last = torch.where(self.sparsity == UNKNOWN, density, self._mean_density())
        # In standard deviations of the logits, were they normal: so far has a router to move them, whatever E is.
        # Positive: too dense, lambda must rise.
        mean = self._error(last + SMOOTH_AVERAGE * pace * (density - last))
        if self.rule == "smooth":
            # Bounded on its own: with many experts the pull would outweigh any damping. It is weaker downwards, because
            # there experts are opened, and lambda would have to come back a long way.
            largest = SMOOTH_MAX_STEP * lr_fraction
            gain = torch.where(mean > 0, SMOOTH_GAIN, SMOOTH_GAIN_CLOSED)
            pull = (gain * pace * mean).clamp(-largest, largest)
            pull = torch.where((mean > 0) & (penalty < SMOOTH_IDLE_PENALTY), largest, pull)
            step = pull + SMOOTH_DAMPING * (mean - self._error(last))
            return step.clamp(-SMOOTH_MAX_STEP, SMOOTH_MAX_STEP).exp(), mean
        if self.rule == "none":
            return torch.ones_like(self.lam), mean
        if self.rule == "official":  # as in the authors' code: S equal to the target counts as too sparse
            return torch.where(self.target - S > 0, self.alpha, 1 / self.alpha).float(), mean
        return sign_rule(S, self.target, self.alpha).float(), mean

    def _error(self, density: Tensor) -> Tensor:
        """Of a density, bounded: an empty batch is very sparse, not infinitely, and a full one not infinitely dense."""
        target = torch.full_like(self.lam, self.target_density)
        least, most = target / 100, (1 - (1 - target) / 100).clamp(max=1 - 1e-4)
        return normal_quantile(density.clamp(least, most)) - normal_quantile(target.clamp(least, most))

    def _mean_density(self) -> Tensor:
        """Of which `mean_error` is the error."""
        target = torch.full_like(self.lam, self.target_density).clamp(max=1 - 1e-4)
        return (1 + torch.erf((normal_quantile(target) + self.mean_error) / math.sqrt(2))) / 2

    def _stacked(self, routings: Sequence[Routing], name: str) -> Tensor:
        return torch.stack([getattr(routing, name).to(self.lam.device) for routing in routings])

    def statistics(self) -> list[str]:
        """Names of the buffers that each rank sums up on its own until `update`."""
        return [name for name in self._buffers if name[0] == "_"]

    @torch.no_grad()
    def discard_statistics(self) -> None:
        """Forgets the forward passes since the last `update`, as those of a step that was broken off."""
        self.penalised = False
        for name in self.statistics():
            getattr(self, name).zero_()
        for router in self.routers:
            router.earlier_load = None

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start, by torch's initialisers: a loader of transformers guards them, so what it loaded stays."""
        nn.init.constant_(self.lam, self.lambda_init)
        nn.init.constant_(self.sparsity, UNKNOWN)
        nn.init.zeros_(self.mean_error)
        nn.init.zeros_(self.dead_steps_L)
        for name in self._non_persistent_buffers_set:
            setattr(self, name, torch.zeros_like(getattr(self, name), device=self.lam.device))
