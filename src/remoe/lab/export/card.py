"""The model card of an exported run: its data, results and sparsity, a picture of its routing, plots of training."""

import math
from pathlib import Path

from remoe.convert.relufy.model import RelufiedMixin
from remoe.lab.analysis import figures
from remoe.lab.analysis.style import save_png
from remoe.lab.data.documents import TOTAL
from remoe.lab.export.header import header
from remoe.lab.export.picture import routing_picture
from remoe.lab.text import markdown
from remoe.lab.training.checkpoint import saved_step
from remoe.lab.training.folder import RunFolder
from remoe.lab.training.metrics import read_metrics
from remoe.lab.training.origin import shape_of_relufied
from remoe.models.configuration_remoe import RemoeConfig
from remoe.models.modeling_remoe import RemoeForCausalLM
from remoe.routing import ROUTERS, ReLURouter

_USE_RELUFIED = """```python
import remoe
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIR")
model = remoe.load_relufied("DIR")
print(tokenizer.decode(model.generate(**tokenizer("PROMPT", return_tensors="pt"), max_new_tokens=50)[0]))
```"""
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)
print(tokenizer.decode(model.generate(**tokenizer("PROMPT", return_tensors="pt"), max_new_tokens=50)[0]))
```"""


def write_card(
    run: RunFolder,
    checkpoint: Path,
    model: RemoeForCausalLM | RelufiedMixin,
    out: Path,
    capped: tuple[float, float] | None = None,
    quantised: tuple[str, float, float] | None = None,
    licence: str | None = None,
) -> None:
    """Writes README.md, a picture of the routing, and plots when the run has its metrics, all as PNG.

    Args:
        run: the run's folder.
        checkpoint: the exported one.
        model: its model.
        out: existing folder.
        capped: of a model with a cap on the experts of a token, its validation loss without and with the cap.
        quantised: of a model with smaller weights, the scheme, and its validation loss before and after.
        licence: identifier of the model's licence on the Hub.
    """
    config = run.load_config()
    summary = run.load_summary()
    records = read_metrics(run.metrics) if run.metrics.is_file() else []
    step = saved_step(checkpoint)
    finished = summary.get("steps") == step
    relufied = isinstance(model, RelufiedMixin)
    c = shape_of_relufied(model.config) if relufied else model.config
    name = out.resolve().name
    validation = summary["validation"] if finished else {}
    routing = routing_picture(model, run, out)
    measured = quantised or capped
    if measured is not None:  # the exported model is not the one that the run measured
        validation = {TOTAL: {"loss": measured[-1], "perplexity": math.exp(min(measured[-1], 700))}}
    parts = [
        header(c, name, config.data, validation, licence, "remoe" if relufied else "transformers"),
        "---\n",
        f"# {markdown(name)}\n",
        _what_relufied(model) if relufied else _what(c),
        (_USE_RELUFIED if relufied else _USE) + "\n",
        *(["## Routing\n", routing] if routing is not None else []),
        "## Training\n",
        _table(
            {
                "data": _data_name(config.data),
                "steps": f"{step} of {config.steps}",
                "tokens": f"{step * config.batch_size * config.seq_len:,}",
                "sequence length": config.seq_len,
                "seed": config.seed,
                "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            }
        ),
    ]
    if capped is not None:
        parts += ["## Cap\n", _cap(c, *capped)]
    if quantised is not None:
        parts += ["## Quantisation\n", _quantised(out, *quantised)]
    left_out = [name for name, given in (("the cap", capped), ("quantisation", quantised)) if given is not None]
    if finished:
        parts += [
            f"## Results of the run, without {' and '.join(left_out)}\n" if left_out else "## Results\n",
            _results(summary, c.steered),
            _domains(summary, c.routes_pairs),
        ]
    else:
        parts.append("This checkpoint is not the last of its run, so its validation loss is not known.\n")
    parts += _plots([record for record in records if record["step"] <= step], summary, c.router, out)
    # The first separator opens the header.
    (out / "README.md").write_text("---\n" + "\n".join(parts), encoding="utf-8")


def _what(c: RemoeConfig) -> str:
    """One sentence about the model."""
    experts, layers = c.experts_per_layer, f"in each of its {c.num_hidden_layers} layers, router `{c.router}`"
    if c.routes_pairs:
        kind = f"A language model with a mixture of {experts} experts {layers}"
    elif c.router_class.merges:
        kind = f"A language model with {experts} experts, merged into one for each segment of the text, {layers}"
    else:
        kind = f"A dense language model (router `{c.router}`)"
    relu = ", the ReLU routing of ReMoE (arXiv 2412.14711)" if c.router_class is ReLURouter else ""
    shared = f"; every token also has a shared expert of width {c.shared_expert_size}" if c.shared_expert_size else ""
    return f"{kind}{relu}{shared}. Trained with `remoe`.\n"


def _what_relufied(model: RelufiedMixin) -> str:
    """The same about a relufied model."""
    settings, count = model.config.relufied, len(model.sparsity.dead_steps_L)
    return (
        f"A language model of transformers' class `{settings['class']}` with {count} layer{'s' * (count > 1)} of "
        f"{settings['num_experts']} experts, whose routers `remoe.relufy` made ReLU routers (ReMoE, arXiv 2412.14711). "
        "Trained with `remoe`.\n"
    )


def _cap(c: RemoeConfig, without: float, with_cap: float) -> str:
    """What the cap is and costs, and how the experts are called."""
    rows = {"experts of a token at most": c.max_experts, "validation loss without the cap": f"{without:.4f}"}
    rows |= {"validation loss with the cap": f"{with_cap:.4f}"}
    return (
        f"A token has at most {c.max_experts} experts, those with the largest gates. The experts are called as those "
        f"of transformers' mixtures, `experts(hidden_states, top_k_index, top_k_weights)` with {c.max_experts} slots; "
        f"a slot that a token does not use has the weight 0.\n\n{_table(rows)}"
    )


def _quantised(out: Path, scheme: str, before: float, after: float) -> str:
    """What quantisation did, and what it costs."""
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    rows = {"validation loss before": f"{before:.4f}", "validation loss after": f"{after:.4f}"}
    rows["size of the weights' files"] = f"{size / 1e6:.1f} MB"
    form = {
        "int8": "The weights of attention and experts are int8, with a scale for each row. Loading needs `torchao`.",
        "int4": "The weights of the experts have 4 bits, with a scale and a least value for each group of 32.",
    }
    return f"{form[scheme]}\n\n{_table(rows)}"


def _data_name(path: str) -> str:
    """The name of the dataset's folder, without its path."""
    name = Path(path).name
    return f"{name}: Python's standard library" if name.startswith("stdlib-") else name


def _table(rows: dict[str, object]) -> str:
    lines = [f"| {name} | {markdown(str(value), longest=1000)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _results(summary: dict, steered: bool) -> str:
    rows: dict[str, object] = {
        "validation loss, nats per token": f"{summary['validation_loss']:.4f}",
        "active parameters": f"{summary['active_parameters']:,}",
        "training FLOPs": f"{summary['flops']:.3g}",
        "peak memory": f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB",
    }
    if steered:
        rows["sparsity, target"] = f"{summary['final_sparsity']:.4f}, {summary['target_sparsity']:.4f}"
        rows["settled at step"] = summary["settling_step"] or "not settled"
    machine = summary.get("machine", {})
    rows["machine"] = ", ".join(f"{name} {value}" for name, value in machine.items())
    return _table(rows)


def _domains(summary: dict, routes_pairs: bool) -> str:
    columns = {"loss": ".4f", "perplexity": ".2f", "bits_per_byte": ".4f"}
    columns |= {"sparsity": ".4f"} if routes_pairs else {}
    lines = [f"| domain | {' | '.join(columns).replace('_', ' ')} |", "|---" * (1 + len(columns)) + "|"]
    for name, row in summary["validation"].items():
        cells = [markdown(name), *(format(row[column], form) for column, form in columns.items())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plots(records: list[dict], summary: dict, router: str, out: Path) -> list[str]:
    if not records:
        return []
    course = ([record["step"] for record in records], [record["lm_loss"] for record in records])
    plots = {"training-loss": ("Training loss", figures.training_losses({router: course}, window=10))}
    if ROUTERS[router].steered:
        course = figures.training_course({router: records}, summary.get("target_sparsity"))
        plots["training-course"] = ("Sparsity, lambda and the penalty", course)
    lines = ["## Plots\n"]
    for name, (title, figure) in plots.items():
        save_png(figure, out / name)
        lines.append(f"![{title}]({name}.png)\n")
    return lines
