"""The generation of a page: a prompt, what a model wrote after it, and the experts that ran meanwhile.

Legend: L layers, T tokens, R = T - 1 tokens that were read, E experts, P executed pairs.
"""

from typing import Any

from remoe.lab.analysis.writing import Written
from remoe.lab.report.packed import exact, short, whole_numbers
from remoe.lab.report.reading import shown_text


def generation_of(written: Written) -> dict[str, Any]:
    """What a page shows of a generation.

    Returns:
        prompt, its number of tokens; sampling, by name; tokens (T,); loss (T,) in nats of each token itself, NaN for
        the first; counts (L, R), the number of experts; expert (P,) and gate (P,), ordered by layer, token and expert.
    """
    sampling = written.identity["sampling"]
    names = ["temperature", *(["top_k", "top_p", "seed"] if sampling["temperature"] > 0 else [])]
    names += [name for name, usual in (("repetition_penalty", 1.0),) if sampling[name] != usual]
    names += [name for name in ("gate_threshold", "max_experts") if sampling[name] is not None]
    active_LRE = written.active_LTE
    ids = written.token_T.tolist()
    return {
        "prompt": written.prompt,
        "sampling": {name.replace("_", "-"): sampling[name] for name in names},
        "tokens": [shown_text(text, token) for text, token in zip(written.texts, ids, strict=True)],
        "loss": exact(written.nats_T.numpy()),
        "counts": whole_numbers(active_LRE.sum(dim=2).numpy()),
        "expert": whole_numbers(active_LRE.nonzero()[:, 2].numpy()),
        "gate": short(written.gate_LTE[active_LRE].numpy()),
    }
