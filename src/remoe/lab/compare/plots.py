"""The figures of a comparison, written beside its report."""

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from remoe.lab.analysis import figures, routing_figures
from remoe.lab.compare.experiment import Experiment, Run
from remoe.lab.compare.record import RunRecord
from remoe.lab.compare.results import Results, Row
from remoe.lab.compare.tables import row_name
from remoe.lab.training.build import router_of
from remoe.routing import ROUTERS

LOSS_WINDOW = 50  # steps of a moving mean
AHEAD = "†"


def draw(experiment: Experiment, results: Results, records: Mapping[str, RunRecord], folder: Path) -> dict[str, str]:
    """Draws everything that the finished runs allow, as SVG and PNG.

    Args:
        experiment: what was asked for.
        results: its numbers.
        records: of each system the run with its variant's first seed, where that is finished; by the system's name.
        folder: where to write.

    Returns:
        Title of each figure, and its PNG's name in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}

    def add(title: str, name: str, figure: Figure) -> None:
        figures.save(figure, folder / name)
        drawn[title] = f"{name}.png"

    look = figures.looks(experiment.variants)
    for words, name, rows in (
        ("equal tokens", "equal-tokens", results.equal_tokens),
        ("equal training FLOPs", "equal-flops", results.equal_flops),
    ):
        if len(rows) > 1 and not experiment.axes:
            losses = {row.variant: row.validation_loss.values for row in rows}
            add(
                f"Validation loss at {words}",
                f"loss-{name}",
                figures.final_losses(losses, look=look),
            )
        for axis in _numeric_axes(experiment) if rows else []:
            word = axis.rpartition(".")[2]
            systems = _by_axis(rows, axis)
            add(
                f"Validation loss against {word} at {words}",
                f"loss-against-{word}-{name}",
                figures.loss_against(systems, word, look=look if systems.keys() <= look.keys() else None),
            )

    first = {run.variant: run for run in reversed(experiment.runs) if _is_first(experiment, run)}
    first = {name: run for name, run in first.items() if _name(run) in records}
    first = {name: first[name] for name in experiment.variants if name in first}
    steps = {name: records[_name(run)].steps() for name, run in first.items()}
    if steps:
        marked = {name: name + AHEAD * router_of(first[name].config).looks_ahead for name in steps}
        courses = {marked[name]: ([r["step"] for r in rs], [r["lm_loss"] for r in rs]) for name, rs in steps.items()}
        lookahead = f" ({AHEAD}: chooses among later tokens)" if marked.keys() != courses.keys() else ""
        add(
            f"Training loss, first seed{lookahead}",
            "training-loss",
            figures.training_losses(courses, window=LOSS_WINDOW, look={marked[name]: look[name] for name in steps}),
        )
    chosen = [name for name in experiment.figures if name in first]
    steered = {name: steps[name] for name in chosen if ROUTERS[first[name].config.router].steered}
    if steered:
        targets = {records[_name(first[name])].summary["target_sparsity"] for name in steered}
        target = targets.pop() if len(targets) == 1 else None
        for words, name, log_steps in (("", "", False), (", logarithmic steps", "-log", True)):
            add(
                f"Course of sparsity and penalty{words} (Fig. 3, 4)",
                f"training-course{name}",
                figures.training_course(steered, target, log_steps=log_steps, look=look),
            )
    _draw_routing({name: records[_name(first[name])] for name in chosen}, look, add)
    _draw_flips(experiment, records, look, add)
    return drawn


def _draw_routing(records: Mapping[str, RunRecord], look: Mapping[str, figures.Look], add: Callable) -> None:
    routings = {name: record.routing for name, record in records.items() if record.routing is not None}
    if not routings:
        return
    points = {name: (one.count_U, one.active_U) for name, one in routings.items() if one.count_U}
    if points:  # ids that occur often enough
        add(
            "Active experts against the frequency of the token (Fig. 7)",
            "active-against-frequency",
            routing_figures.active_against_frequency(points, look=look),
        )
    shares = {name: routing.share_LE for name, routing in routings.items()}
    k = {name: record.options["k"] * record.options["granularity"] for name, record in records.items()}
    add("Share of tokens of each expert (Fig. 8)", "routed-share", routing_figures.routed_share_maps(shares, k))
    for name, routing in routings.items():
        add(
            f"{name}: share of each domain's tokens (Fig. 9, 12)",
            f"routed-share-by-domain-{name}",
            routing_figures.routed_share_by_domain(routing.share_CLE, routing.domains, k[name]),
        )


def _draw_flips(
    experiment: Experiment, records: Mapping[str, RunRecord], look: Mapping[str, figures.Look], add: Callable
) -> None:
    """Of every point: the paper shows two numbers of experts."""
    runs, experts = {}, {}
    for run in experiment.runs:
        if run.variant not in experiment.figures or (name := _name(run)) not in records or name in runs:
            continue
        steps, rates = records[name].flip_rates()
        if steps:
            runs[name] = (steps, rates)
            experts[name] = run.config.num_experts * run.config.granularity
    if runs:
        looks = figures.looks(runs) if experiment.axes else look  # along an axis a variant has several lines
        add("Flips of the routing (Fig. 10)", "flips", routing_figures.flips(runs, experts, look=looks))


def _is_first(experiment: Experiment, run: Run) -> bool:
    """Whether a run is its variant's at the first point and its first seed."""
    return run.point == experiment.points[0] and run.seed == experiment.variants[run.variant].seeds[0]


def _name(run: Run) -> str:
    return row_name(run.variant, dict(run.point))


def _numeric_axes(experiment: Experiment) -> list[str]:
    """The axes that a curve can be drawn along."""
    numeric = []
    for axis, values in experiment.axes.items():
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if numbers and len(values) > 1:
            numeric.append(axis)
    return numeric


def _by_axis(rows: list[Row], axis: str) -> dict[str, dict[float, list[float]]]:
    """Losses along an axis: of each variant, and of each point of the other axes where there are such."""
    systems: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        others = {name: value for name, value in row.point.items() if name != axis}
        systems.setdefault(row_name(row.variant, others), {})[row.point[axis]] = row.validation_loss.values
    return systems
