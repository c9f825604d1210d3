"""The experiment file: what it asks for, and every mistake in it said in one line."""

import time

import pytest
import yaml

from remoe.errors import ConfigError
from remoe.lab.compare import experiment as module
from remoe.lab.compare.experiment import experiment_from_dict, load_experiment
from remoe.lab.nested import merge
from remoe.lab.training.config import config_from_yaml


def experiment(**given):
    return experiment_from_dict({"variants": {"relu": {}, "topk": {"router": "topk"}}, **given}, "trial", "trial.yaml")


def test_runs_are_the_product_of_seeds_points_and_variants_seed_by_seed():
    found = experiment(seeds=[3, 4], axes={"num_experts": [4, 8], "optim.lr": [1e-3]}, base={"steps": 7})
    named = [(run.seed, run.config.num_experts, run.variant, run.config.router) for run in found.runs]
    assert named == [
        (seed, experts, router, router) for seed in (3, 4) for experts in (4, 8) for router in ("relu", "topk")
    ]
    assert all(run.steps == run.config.steps == 7 and run.config.optim.lr == 1e-3 for run in found.runs)
    assert len({run.key for run in found.runs}) == 8


def test_a_variant_keeps_its_own_value_of_an_axis_and_its_own_seeds():
    found = experiment(
        seeds=[0, 1],
        axes={"num_experts": [4, 8]},
        variants={"relu": {}, "dense": {"router": "dense", "num_experts": 2, "seeds": [5]}},
    )
    dense = [run for run in found.runs if run.variant == "dense"]
    assert [run.seed for run in dense] == [5, 5]
    assert {run.config.num_experts for run in dense} == {2}
    assert len({run.key for run in dense}) == 1  # one run serves both points


def test_a_key_names_what_is_computed_and_nothing_else():
    def key(**base):
        return experiment(base=base).runs[0].key

    plain = key()
    assert plain == key(num_experts=8) == key(optim={"lr": 2e-3}) == key(optim={"lr": "2e-3"})  # tiny's own values
    assert plain == key(print_every=1, validate={"every": 7}, checkpoint={"keep": 1})
    others = [key(num_experts=4), key(optim={"lr": 1e-3}), key(steps=9), key(router_options={"gate_scale": 2})]
    assert len({plain, *others}) == 5
    assert plain != key(preset="mini")
    assert key(router_options={"gate_scale": 2}) == key(router_options={"gate_scale": 2.0})


def test_keys_are_those_of_0_1_0_under_todays_names_and_under_the_former_ones():
    """The first eight digits, as 0.1.0 computed them; its routers of tiny started as all other weights."""
    plain = "e4fb6a74"
    model = {"load_balance": False, "max_experts_per_token": 4}
    for base, key in (
        ({"model": model}, "0b5ae823"),
        ({"router_options": model}, "0b5ae823"),
        ({"router_options": {"load_balance": True, "max_experts_per_token": None}}, plain),
        ({"model": {"experts_backend": "loop"}}, "0f3c318c"),
        ({"model": {"experts_backend": "auto"}}, plain),
    ):
        run = experiment(base=merge(base, {"model": {"router_std": None}})).runs[0]
        assert run.key[:8] == key, base
    labels = [
        experiment(variants={"relu": options}).runs[0].label
        for options in ({"model": model}, {"router_options": model})
    ]
    assert labels == ["tiny-relu-no_load_balance-max_experts_per_token4-seed0"] * 2


def test_everything_has_a_default():
    found = experiment()
    assert (found.title, found.reference, found.points, found.figures) == ("trial", "relu", [()], ["relu", "topk"])
    assert [run.label for run in found.runs] == ["tiny-relu-seed0", "tiny-topk-seed0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"variants": {}}, "variants is empty"),
        ({"variants": ["relu"]}, "trial.yaml: variants must be a mapping, name: {options}"),
        ({"variants": {"relu": 3}}, "trial.yaml: variants.relu: variants must be a mapping, name: {options}"),
        ({"sedes": [1]}, "trial.yaml: sedes: unknown key; perhaps seeds"),
        ({"seeds": [1, 1]}, "only once"),
        ({"seeds": "many"}, "trial.yaml: seeds must be a list of whole numbers"),
        ({"seeds": [0, "one"]}, "trial.yaml: seeds.1: seeds must be a list of whole numbers"),
        ({"base": [1]}, "trial.yaml: base must be a mapping of options"),
        ({"axes": {"k": 1}}, "trial.yaml: axes.k: axes must be a mapping, option: [values]"),
        ({"reference": "dense"}, "trial.yaml: reference: 'dense' is not one of the variants: relu, topk"),
        ({"figures": ["hash"]}, "trial.yaml: figures: 'hash' is not one of the variants"),
        ({"figures": ["topkk"]}, "trial.yaml: figures: 'topkk' is not one of the variants; perhaps topk"),
        ({"base": {"out": "x"}}, "out cannot be set here: use --pool"),
        ({"base": {"seed": 1}}, "seed cannot be set here: use seeds"),
        ({"base": {"lr": 1}}, "trial.yaml: base: unknown option 'lr'; perhaps optim.lr"),
        ({"base": {"stepz": 1}}, "trial.yaml: base: unknown option 'stepz'; perhaps steps"),
        ({"base": {"every": 1}}, "unknown option 'every'; perhaps checkpoint.every or validate.every"),
        ({"base": {"optim": {"wamrup_ratio": 1}}}, "unknown option 'optim.wamrup_ratio'; perhaps optim.warmup_ratio"),
        ({"base": {"optim.lr": 1}}, "trial.yaml: base: unknown option 'optim.lr'; perhaps optim: {lr: ...}"),
        ({"base": {"steps": "ten"}}, "steps"),
        ({"base": {"batch_size": 10, "micro_batch_size": 3}}, "tiny-relu-seed0: --micro-batch-size 3 does not divide"),
        ({"axes": {"num_experts": []}}, "needs at least one value"),
        ({"axes": {"experts": [1]}}, "trial.yaml: axes: unknown option 'experts'; perhaps num_experts"),
        ({"axes": {"xyz": [1]}}, "trial.yaml: axes: unknown option 'xyz'"),
        ({"axes": {"vocab_size": [300, 400]}}, "vocab_size must be the same"),
        ({"variants": {"relu": {"router": "relu", "data": "x"}}}, "variant relu: data cannot be set here"),
        ({"variants": {"relu": {"ruoter": "relu"}}}, "variant relu: unknown option 'ruoter'; perhaps router"),
        ({"variants": {"relu/paper": {}}}, "variant 'relu/paper': a name has only letters"),
        ({"axes": {"router_options": [{"gate_scale": 2.0}]}}, "axes: router_options needs plain values"),
        (
            {"base": {"router_options": {"load_balance": True}, "model": {"load_balance": False}}},
            "model.load_balance is the former name of router_options.load_balance",
        ),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ConfigError) as error:
        experiment(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_too_many_runs_are_refused_at_once_and_many_are_announced(caplog, monkeypatch):
    some = [0.001 + number * 1e-6 for number in range(516)]
    given = {"variants": {"relu": {}, "topk": {"router": "topk", "seeds": [1]}}, "seeds": [0, 1]}
    axes = {"optim.lr": some, "optim.beta2": [1 - value for value in some]}
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"x: 798,768 runs, of 266,256 points; an experiment has at most 10,000"):
        experiment_from_dict(given | {"axes": axes}, "x", "x")
    assert time.process_time() - begin < 1
    assert caplog.messages == []
    monkeypatch.setattr(module, "MANY_RUNS", 10)
    assert len(experiment_from_dict(given | {"axes": {"optim.lr": some[:5]}}, "x", "x").runs) == 15
    assert caplog.messages == ["checking the options of 15 runs, which takes a while"]


def test_a_file_of_options_has_a_bound(tmp_path):
    path = tmp_path / "huge.yaml"
    path.write_text("steps: [" + 400_000 * "1, " + "1]")
    begin = time.process_time()
    with pytest.raises(ConfigError, match=r"huge\.yaml: 1,200,010 bytes, and a file of options has at most 1,048,576"):
        load_experiment(path)
    with pytest.raises(ConfigError, match="at most 1,048,576"):
        config_from_yaml(path)
    assert time.process_time() - begin < 1


def test_numbers_are_numbers_in_any_notation(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("variants: {a: {}}\naxes: {optim.lr: [1e-3, 2E-3, 3.0e-3, .004]}\n")
    assert load_experiment(path).axes == {"optim.lr": [1e-3, 2e-3, 3e-3, 4e-3]}
    path.write_text("variants: {a: {}}\naxes: {optim.lr: [1e-3, 0.001]}\n")
    with pytest.raises(ConfigError, match="only once"):
        load_experiment(path)


def test_options_laid_over_the_base(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("base: {steps: 9, model: {hidden_size: 32}}\nvariants: {a: {}, b: {batch_size: 32}}\n")
    changed = {"steps": 90, "model.num_hidden_layers": "2", "batch_size": 64, "optim.lr": "1e-3"}
    one, other = load_experiment(path, changed).runs
    assert (one.steps, one.config.batch_size, one.config.optim.lr) == (90, 64, 1e-3)
    assert (one.config.model.hidden_size, one.config.model.num_hidden_layers) == (32, 2)
    assert other.config.batch_size == 32  # a variant's own
    for name, message in (("stps", "unknown option 'stps'"), ("seed", "seed cannot be set here")):
        with pytest.raises(ConfigError, match=message):
            load_experiment(path, {name: 1})


def test_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.yaml"
    for text, message in (
        ("- 1", "not a mapping"),
        ("a: [", "line 1, column 5: expected"),
        ("variants: {a: {}, a: {}}", "twice"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_experiment(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_experiment(tmp_path / "none.yaml")
    path.write_text("title: no variants")
    with pytest.raises(ConfigError, match="variants is missing"):
        load_experiment(path)


def test_every_committed_experiment_loads(pytestconfig):
    files = sorted((pytestconfig.rootpath / "experiments").glob("*.yaml"))
    assert files
    for file in files:
        assert load_experiment(file).title == yaml.safe_load(file.read_text())["title"]
