"""Figures show the numbers they were given, and the same figure is the same file."""

import math
import warnings
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from remoe.lab.analysis import figures, routing_figures
from remoe.lab.analysis.style import looks, plain

STEPS = [1, 2, 3, 4, 5, 6]
SPARSITY = [0.5, 0.5, 0.6, 0.8, 0.74, 0.76]


def records(scale: float) -> list[dict]:
    stages = ["dense", "dense", "sparsifying", "sparse", "sparse", "sparse"]
    return [
        {
            "step": step,
            "lm_loss": scale * (9 - step),
            "reg_loss": scale / step,
            "lambda": 10.0 ** (step - 8),
            "sparsity": sparsity,
            "stage": stage,
            "sparsity_per_layer": [sparsity - 0.1, sparsity + 0.1],
            "load_per_expert": [[0.25] * 4] * 2,
        }
        for step, sparsity, stage in zip(STEPS, SPARSITY, stages, strict=True)
    ]


COURSES = {"ReMoE": records(1), "no balance": records(1.1)}
LOSSES = {"ReMoE": (STEPS, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), "TopK": (STEPS, [6.0, 5.5, 5.0, 4.0, 3.0, 2.0])}
AGAINST = {"ReMoE": {8: [2.0, 1.8], 128: [1.5], 32: [1.7, 1.6, 1.5]}, "TopK": {8: [2.1], 32: [1.9]}}
FINAL = {"TopK": [2.0, 2.2], "ReMoE": [1.8, 2.0, 1.9], "dense": [2.5]}
FREQUENCY = {
    "ReMoE": ([1, 1, 2, 3, 9], torch.tensor([3.0, 2.0, 1.5, 2.5, 1.0])),
    "TopK": ([1, 2, 4], [1.0, 1.0, 1.0]),
}
SHARES = {"ReMoE": torch.tensor([[0.5, 0.25, 0.0], [0.25, 0.01, 0.75]]), "wide": [[0.1, 0.2, 0.3, 0.4]]}
BY_DOMAIN = np.arange(2 * 5 * 3).reshape(2, 5, 3) / 40
FLIPS = {"ReMoE": (STEPS, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1]), "TopK": (STEPS, [0.6, 0.5, 0.4, 0.4, 0.3, 0.2])}

DRAWINGS: dict[str, Callable[[], Figure]] = {
    "training_course": lambda: figures.training_course(COURSES, 0.75),
    "training_course_log": lambda: figures.training_course(COURSES, log_steps=True),
    "training_losses": lambda: figures.training_losses(LOSSES, window=2),
    "loss_against": lambda: figures.loss_against(AGAINST, "experts E"),
    "final_losses": lambda: figures.final_losses(FINAL),
    "active_against_frequency": lambda: routing_figures.active_against_frequency(FREQUENCY),
    "routed_share_maps": lambda: routing_figures.routed_share_maps(SHARES, dict.fromkeys(SHARES, 1)),
    "routed_share_by_domain": lambda: routing_figures.routed_share_by_domain(BY_DOMAIN, ["farm", "town"], 1),
    "load_course": lambda: routing_figures.load_course(STEPS, np.linspace(0, 1, 6 * 3 * 4).reshape(6, 3, 4), 1),
    "flips": lambda: routing_figures.flips(FLIPS, {"ReMoE": 4, "TopK": 8}),
}


@pytest.mark.parametrize("name", list(DRAWINGS))
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_figure_is_saved_as_svg_and_png_and_always_the_same(name, tmp_path):
    fig = DRAWINGS[name]()
    figures.save(fig, tmp_path / "first")
    figures.save(fig, tmp_path / "again")
    figures.save(DRAWINGS[name](), tmp_path / "anew")
    for suffix, beginning in {"svg": b"<?xml", "png": b"\x89PNG"}.items():
        first = (tmp_path / f"first.{suffix}").read_bytes()
        assert first.startswith(beginning)
        assert len(first) > 5000
        assert (tmp_path / f"again.{suffix}").read_bytes() == first
        assert (tmp_path / f"anew.{suffix}").read_bytes() == first


def test_the_last_digit_of_a_layout_does_not_count(tmp_path):
    """The layout solver does not always reproduce it, and ids in the SVG hash positions."""
    fig = DRAWINGS["routed_share_by_domain"]()
    figures.save(fig, tmp_path / "first")
    for ax in fig.axes:
        ax.set_position(np.nextafter(ax.get_position(original=True).bounds, 1))
    for panel in fig.subfigs:
        panel.bbox_relative.p0 = np.nextafter(panel.bbox_relative.p0, 1)
    figures.save(fig, tmp_path / "moved")
    assert (tmp_path / "moved.svg").read_bytes() == (tmp_path / "first.svg").read_bytes()


def xy(line) -> tuple[list, list]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def curves(ax) -> list[tuple[list, list]]:
    """Lines that follow data; the straight ones across the axes are marks."""
    return [xy(line) for line in ax.lines if len(line.get_xdata()) > 2]


def marks(ax) -> list[tuple[list, list]]:
    return [xy(line) for line in ax.lines if len(line.get_xdata()) == 2]


def test_the_course_is_that_of_the_records():
    fig = figures.training_course(COURSES, 0.75)
    drawn = {ax.get_title(loc="left"): ax for ax in fig.axes}
    assert list(drawn) == [
        "Sparsity S",
        "Coefficient λ",
        "Regulariser $L_{reg}$",
        "Penalty λ·$L_{reg}$",
        "Language model loss $L_{lm}$",
        "S per layer, last 10% of the steps",
    ]
    lambdas = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    assert curves(drawn["Sparsity S"]) == [(STEPS, SPARSITY)] * 2
    assert curves(drawn["Coefficient λ"])[1] == (STEPS, pytest.approx(lambdas))
    assert curves(drawn["Regulariser $L_{reg}$"])[0] == (STEPS, pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6]))
    penalty = [1e-7, 5e-7, 1e-5 / 3, 2.5e-5, 2e-4, 1e-2 / 6]
    assert curves(drawn["Penalty λ·$L_{reg}$"])[0] == (STEPS, pytest.approx(penalty))
    assert curves(drawn["Language model loss $L_{lm}$"])[0] == (STEPS, [8, 7, 6, 5, 4, 3])
    # One record is the last tenth of six; the third line is the target.
    per_layer = drawn["S per layer, last 10% of the steps"].lines
    assert xy(per_layer[0]) == ([0, 1], pytest.approx([0.66, 0.86]))
    assert xy(per_layer[2])[1] == [0.75, 0.75]
    assert marks(drawn["Sparsity S"]) == [([4, 4], [0, 1]), ([4, 4], [0, 1]), ([0, 1], [0.75, 0.75])]


def test_a_run_that_is_always_sparse_has_no_mark_of_the_stage():
    always = [record | {"stage": "sparse"} for record in records(1)]
    never = [record | {"stage": "dense"} for record in records(1)]
    fig = figures.training_course({"topk": always, "short": never})
    assert marks(fig.axes[0]) == []


def test_training_losses_are_moving_means_over_the_records():
    fig = figures.training_losses(LOSSES, window=2)
    whole, late = fig.axes
    assert curves(whole)[0] == LOSSES["ReMoE"]
    assert curves(whole)[1] == ([1.5, 2.5, 3.5, 4.5, 5.5], [5.5, 4.5, 3.5, 2.5, 1.5])
    assert curves(whole)[3] == ([1.5, 2.5, 3.5, 4.5, 5.5], [5.75, 5.25, 4.5, 3.5, 2.5])
    assert late.get_xlim() == (4, 5.5)  # where the means end
    # The means from step 4 on: 2.5 1.5 and 3.5 2.5, with a margin.
    assert late.get_ylim() == pytest.approx((1.38, 3.62))
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["TopK", "ReMoE"]
    assert curves(figures.training_losses(LOSSES).axes[0]) == list(LOSSES.values())
    # Means of more than a third of the run would leave the last third empty.
    assert xy(figures.training_losses(LOSSES, window=99).axes[1].lines[0])[0] == [1.5, 2.5, 3.5, 4.5, 5.5]


def segments(collection) -> list:
    return [segment.tolist() for segment in collection.get_segments() if len(segment)]


def test_losses_that_are_recorded_seldom_in_the_end():
    """Such as those of a run resumed with another --log-every: no mean falls in its last third."""
    steps = [*range(1, 31), 1000]
    fig = figures.training_losses({"a": (steps, [3.0] * 30 + [2.0])}, window=20)
    low, high = fig.axes[1].get_ylim()
    assert low < np.mean([3.0] * 9 + [2.0]) < high


def test_loss_against_an_axis_is_means_and_deviations_of_seeds():
    ax = figures.loss_against(AGAINST, "experts E").axes[0]
    remoe, topk = ax.containers
    assert xy(remoe.lines[0]) == ([8, 32, 128], pytest.approx([1.9, 1.6, 1.5]))
    assert xy(topk.lines[0]) == ([8, 32], [2.1, 1.9])
    eight, thirty_two = segments(remoe.lines[2][0])
    # 2.0 and 1.8 deviate by 0.1 sqrt(2), and 1.7 1.6 1.5 by 0.1.
    low, high = 1.9 - math.sqrt(0.02), 1.9 + math.sqrt(0.02)
    assert [x for bar in (eight, thirty_two) for x, _ in bar] == [8, 8, 32, 32]
    assert [y for bar in (eight, thirty_two) for _, y in bar] == pytest.approx([low, high, 1.5, 1.7])
    assert segments(topk.lines[2][0]) == []  # one seed has no deviation
    assert ax.get_xlabel() == "experts E (log scale)"


def test_ticks_are_the_values_of_the_axis():
    ax = figures.loss_against({"a": {182e6: [2.0], 978e6: [1.9], 5.73e9: [1.8]}}, "parameters N").axes[0]
    form = ax.xaxis.get_major_formatter()
    assert [form(tick) for tick in ax.get_xticks()] == ["182M", "978M", "5.73B"]


def test_final_losses_are_sorted_and_written_out():
    ax = figures.final_losses(FINAL).axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["ReMoE", "TopK", "dense"]
    assert [bar.lines[0].get_xdata()[0] for bar in ax.containers] == pytest.approx([1.9, 2.1, 2.5])
    assert [text.get_text() for text in ax.texts] == ["1.900 ± 0.100", "2.100 ± 0.141", "2.500"]
    seeds = [xy(line)[0] for line in ax.lines if line.get_marker() == "|" and line.get_linestyle() == "None"]
    assert [1.8, 2.0, 1.9] in seeds
    assert [2.5] in seeds


def test_frequency_shows_every_id_and_means_of_octaves():
    remoe, topk = routing_figures.active_against_frequency(FREQUENCY).axes
    dots = remoe.collections[0].get_offsets().tolist()
    assert dots == [[1, 3], [1, 2], [2, 1.5], [3, 2.5], [9, 1]]
    counts, means = xy(remoe.lines[0])
    assert counts == pytest.approx([1, math.sqrt(6), 9])
    assert means == [2.5, 2, 1]
    # 3 + 2 + 2 * 1.5 + 3 * 2.5 + 9 over 16 tokens.
    assert xy(remoe.lines[1])[1] == pytest.approx([24.5 / 16] * 2)
    assert "undefined" in topk.texts[0].get_text()
    # Ranks of counts 1.5 1.5 3 4 5, of means 5 3 2 4 1: covariance -6, squares 9.5 and 10.
    assert remoe.texts[0].get_text() == f"rank correlation −{6 / math.sqrt(95):.2f}"


def test_maps_show_the_shares_their_inactive_experts_and_sparsity():
    fig = routing_figures.routed_share_maps(SHARES, dict.fromkeys(SHARES, 1))
    remoe, side, wide = fig.axes[:3]
    assert remoe.images[0].get_array().tolist() == pytest.approx(SHARES["ReMoE"].numpy())
    assert wide.images[0].get_array().tolist() == SHARES["wide"]
    assert remoe.images[0].get_clim() == wide.images[0].get_clim() == (0, 0.75)
    assert remoe.collections[0].get_offsets().tolist() == [[2, 0], [1, 1]]  # (expert, layer)
    assert wide.collections[0].get_offsets().tolist() == []
    assert [bar.get_width() for bar in side.patches] == pytest.approx([0.75, 1 - 1.01 / 3])


def test_domains_have_a_bar_per_expert_in_every_layer():
    fig = routing_figures.routed_share_by_domain(BY_DOMAIN, ["farm", "town"], 1)
    panels = {ax.get_title(loc="left"): ax for ax in fig.axes if ax.get_visible()}
    assert list(panels) == [f"layer {layer}" for layer in range(5)] + ["Mean active experts"]
    for layer in range(5):
        farm, town = panels[f"layer {layer}"].containers
        assert [bar.get_height() for bar in farm] == BY_DOMAIN[0, layer].tolist()
        assert [bar.get_height() for bar in town] == BY_DOMAIN[1, layer].tolist()
        assert [farm[e].get_x() < e < town[e].get_x() + town[e].get_width() for e in range(3)] == [True] * 3
    farm, town = (xy(line) for line in panels["Mean active experts"].lines)
    # Layer 0 of the first domain has shares 0, 1/40, 2/40.
    assert farm == ([0, 1, 2, 3, 4], pytest.approx([3 / 40, 12 / 40, 21 / 40, 30 / 40, 39 / 40]))
    assert town[1][0] == pytest.approx(48 / 40)


@pytest.mark.parametrize(("domains", "experts"), [(150, 8), (10, 64)])
def test_many_domains_or_experts_make_maps(domains, experts):
    share_CLE = np.random.default_rng(0).random((domains, 2, experts))
    fig = routing_figures.routed_share_by_domain(share_CLE, [f"d{i}" for i in range(domains)], 1)
    panels = {ax.get_title("left"): ax for ax in fig.axes if ax.get_title("left")}
    assert list(panels) == ["layer 0", "layer 1", "Mean active experts"]
    assert panels["layer 1"].images[0].get_array().tolist() == share_CLE[:, 1].tolist()
    np.testing.assert_allclose(panels["Mean active experts"].images[0].get_array(), share_CLE.sum(axis=2))
    names, places = panels["layer 0"].get_yticklabels(), panels["layer 0"].get_yticks()
    assert len(names) <= 60
    assert [name.get_text() for name in names] == [f"d{place}" for place in places]


@pytest.mark.filterwarnings("error")
def test_a_model_whose_experts_are_all_closed_is_drawn_as_one(tmp_path):
    fig = routing_figures.routed_share_maps({"closed": np.zeros((2, 8))}, {"closed": 1})
    assert fig.axes[0].images[0].get_clim() == (0, 1)
    figures.save(fig, tmp_path / "closed")
    figures.save(routing_figures.routed_share_by_domain(np.zeros((2, 2, 8)), ["a", "b"], 1), tmp_path / "domains")


def test_loads_over_training_are_means_over_runs_of_steps():
    load_SLE = np.arange(1000 * 3 * 4).reshape(1000, 3, 4) / 12000
    fig = routing_figures.load_course(range(1, 1001), load_SLE, k=1)
    panels = [ax for ax in fig.axes if ax.get_title("left")]
    assert [ax.get_xlabel() for ax in panels] == ["", "step", "step"]  # under each column
    assert [ax.get_title("left") for ax in panels] == ["layer 0", "layer 1", "layer 2"]
    for layer, ax in enumerate(panels):
        drawn_EN = ax.images[0].get_array()
        assert drawn_EN.shape == (4, 400)
        # a column is two and a half steps wide
        np.testing.assert_allclose(drawn_EN[:, 0], load_SLE[:2, layer].mean(axis=0))
        np.testing.assert_allclose(drawn_EN[:, 1], load_SLE[2:5, layer].mean(axis=0))
        np.testing.assert_allclose(drawn_EN[:, -1], load_SLE[-3:, layer].mean(axis=0))
        assert ax.images[0].get_extent() == [0.5, 1000.5, 3.5, -0.5]


def test_loads_stand_where_their_steps_are():
    load_SLE = np.arange(4.0).reshape(4, 1, 1) / 4
    fig = routing_figures.load_course([1, 2, 3, 9], load_SLE, k=1)
    # columns of 2.25 steps: 1 and 2 in the first, 3 (and nothing) in the next, then what is recorded next
    np.testing.assert_allclose(fig.axes[0].images[0].get_array()[0], [0.125, 0.5, 0.75, 0.75])


def test_flip_counts_are_experts_times_mean_rates():
    left, right = routing_figures.flips(FLIPS, {"ReMoE": 4, "TopK": 8}).axes
    assert [xy(line) for line in left.lines] == list(FLIPS.values())
    assert [bar.get_width() for bar in right.patches] == pytest.approx([4 * 0.9 / 6, 8 * 2.4 / 6])
    assert [text.get_text() for text in right.get_yticklabels()] == ["ReMoE", "TopK"]


def test_names_are_drawn_letter_by_letter(tmp_path):
    names = ["_b", "$50 to $60", r"C:$\new$", "c[en]"]
    shares = np.full((4, 1, 2), 0.5)
    figure = routing_figures.routed_share_by_domain(shares, names, 1)
    legend = figure.subfigs[0].legends[0]
    assert len(legend.get_texts()) == len(names)
    figures.save(figure, tmp_path / "domains")  # no formula to go wrong
    losses = {name: ([1, 2, 3], [3.0, 2.0, 1.0]) for name in names}
    assert len(figures.training_losses(losses).legends[0].get_texts()) == len(names)


STRANGE = [
    "\x1b[31mred",
    "a\nb",
    "中文 データ",
    "📚🎉",
    "--><script>",
    "\u202egnp",
    "\udcff",
    "x" * 3000,
    "é ü ß",
    "漢" * 3000,
]


@pytest.mark.parametrize("draw", ["bars", "maps", "losses", "final", "frequency", "flips", "shares"])
def test_any_name_makes_a_figure_without_warnings_that_is_not_huge(draw, tmp_path):
    names, shares = STRANGE, np.full((len(STRANGE), 1, 2), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = {
            "bars": lambda: routing_figures.routed_share_by_domain(shares, names, 1),
            "maps": lambda: routing_figures.routed_share_by_domain(np.repeat(shares, 2, 0), names * 2, 1),
            "losses": lambda: figures.training_losses({name: ([1, 2, 3], [3.0, 2.0, 1.0]) for name in names}),
            "final": lambda: figures.final_losses({name: [3.0] for name in names}),
            "frequency": lambda: routing_figures.active_against_frequency({name: ([9], [1.0]) for name in names[:3]}),
            "flips": lambda: routing_figures.flips({name: ([1], [0.5]) for name in names}, dict.fromkeys(names, 2)),
            "shares": lambda: routing_figures.routed_share_maps(
                dict.fromkeys(names[:3], shares[0]), dict.fromkeys(names, 1)
            ),
        }[draw]()
        figures.save(figure, tmp_path / "figure")
    tree = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert tree.tag.endswith("svg")
    assert not any("script" in element.tag for element in tree.iter())
    assert figure.get_figwidth() < 12
    boxes = [legend.get_window_extent() for panel in (figure, *figure.subfigs) for legend in panel.legends]
    assert all(0 <= box.x0 < box.x1 <= figure.bbox.width for box in boxes)


def test_characters_that_no_font_has_are_written_out():
    assert plain("é_$") == r"é_\$"
    assert plain("a\x1b\U000f0000") == r"a\x1b\U000f0000"


def test_systems_with_the_same_short_name_keep_their_losses():
    names = ["x" * 3000 + "a", "x" * 2999 + "a"]
    losses = {name: ([1, 2, 3], [9.0, 9.0, float(end)]) for end, name in enumerate(names)}
    look = figures.looks(names)
    lines = figures.training_losses(losses).legends[0].get_lines()
    assert [line.get_color() for line in lines] == [look[name].color for name in reversed(names)]


def test_a_legend_of_long_names_stays_within_its_figure(tmp_path):
    names = [f"a_domain_of_a_long_name_{i}" for i in range(6)]
    figure = routing_figures.routed_share_by_domain(np.full((6, 1, 2), 0.5), names, 1)
    figure.savefig(tmp_path / "domains.png")
    box = figure.subfigs[0].legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_a_look_is_one_runs_own_and_can_be_kept_over_figures():
    names = [str(i) for i in range(21)]
    assert len(set(looks(names).values())) == 21
    look = looks(["dense", "TopK", "ReMoE"])
    left, _ = routing_figures.flips(FLIPS, {"ReMoE": 4, "TopK": 8}, look=look).axes
    assert [line.get_color() for line in left.lines] == [look["ReMoE"].color, look["TopK"].color]
    ax = figures.training_losses(LOSSES, look=look).axes[0]
    assert [line.get_color() for line in ax.lines] == [look["ReMoE"].color, look["TopK"].color]
