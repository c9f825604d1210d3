"""Options from dicts, from YAML files and from version 0.1.0."""

import pytest

from remoe.errors import ConfigError
from remoe.lab.cli.parsing import parse
from remoe.lab.compare.keys import key_of
from remoe.lab.training.changes import differences
from remoe.lab.training.config import TrainConfig, config_from_dict, config_from_yaml
from remoe.lab.training.renamed import renamed
from remoe.lab.training.yaml_files import to_yaml

DEFAULTS_OF_0_1_0 = {"experts_backend": "auto", "load_balance": True, "max_experts_per_token": None}


@pytest.mark.parametrize(("batch", "micro"), [(4, 4), (16, 16), (24, 12), (64, 16), (17, 1)])
def test_the_micro_batch_size_divides_the_batch_size_where_it_is_not_given(batch, micro):
    assert config_from_dict({"batch_size": batch}, "test").micro_batch_size == micro


def test_words_and_numbers_of_a_configuration_are_what_they_mean(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("router: relu_norm\nrouter_options: {locality: 1e-3}\n")
    assert config_from_yaml(path).router_options == {"locality": 1e-3}
    path.write_text("router_options: {max_experts_per_token: null}\n")
    assert config_from_yaml(path).router_options == {"max_experts_per_token": None}
    path.write_text("router_options: {gate_scale: [1, 2]}\n")
    with pytest.raises(ConfigError, match=r"router_options.gate_scale: must be true or false, a number, a word"):
        config_from_yaml(path)
    for word in ("12e5", "1e-3", "true", "3", "plain"):  # a folder's name, for instance
        path.write_text(to_yaml(TrainConfig(out=word).to_dict()))
        assert config_from_yaml(path).out == word
    path.write_text("router: topk\nrouter: relu\n")
    with pytest.raises(ConfigError, match="given twice"):
        config_from_yaml(path)
    for word, value in (("no", False), ("Off", False), ("yes", True), ("1e2", 100.0), ("3", 3), ("l1", "l1")):
        found = parse(TrainConfig, ["--router-options", "x", word], prog="x").router_options["x"]
        assert found == value
        assert type(found) is type(value)


def test_the_options_of_0_1_0_have_todays_names():
    old = {"hidden_size": 64, "experts_backend": "loop", "load_balance": False, "max_experts_per_token": 4}
    found = config_from_dict({"model": old, "num_experts": 4, "k": 2, "granularity": 3}, "test")
    assert (found.model.hidden_size, found.model.backend) == (64, "cpu")
    assert found.router_options == {"load_balance": False, "max_experts_per_token": 4}
    assert (found.experts_per_layer, found.active_per_token) == (12, 6)


@pytest.mark.parametrize("router", ["relu", "topk", "dense"])
def test_old_names_with_their_defaults_are_dropped(router):
    old = config_from_dict({"router": router, "model": DEFAULTS_OF_0_1_0}, "test")
    assert old == config_from_dict({"router": router}, "test")


def test_an_old_name_does_not_replace_what_stands_under_the_new_one():
    model = {"experts_backend": "loop", "backend": "grouped", "load_balance": False}
    found = config_from_dict({"model": model, "router_options": {"load_balance": True, "gate_scale": 2.0}}, "test")
    assert found.model.backend == "grouped"
    assert found.router_options == {"load_balance": True, "gate_scale": 2.0}


def test_a_router_without_load_balance_ignores_it_as_in_0_1_0():
    found = config_from_dict({"router": "topk", "model": {"load_balance": False}}, "test")
    assert found == config_from_dict({"router": "topk"}, "test")


def test_renaming_leaves_its_argument_and_other_options_alone():
    values = {"model": {"load_balance": False, "hidden_size": 64}, "steps": 3}
    assert renamed(values) == {"model": {"hidden_size": 64}, "steps": 3, "router_options": {"load_balance": False}}
    assert values == {"model": {"load_balance": False, "hidden_size": 64}, "steps": 3}
    for odd in ({}, {"model": 7}, {"steps": 3}):  # what is wrong with it is said elsewhere
        assert renamed(odd) == odd
    with pytest.raises(ConfigError, match="router_options"):
        config_from_dict({"model": {"load_balance": False}, "router_options": 7}, "test")


def test_domain_weights_are_given_by_name(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("domain_weights: {code: 2, my manual: 0.5}\n")
    found = config_from_yaml(path)
    assert found.domain_weights == {"code": 2.0, "my manual": 0.5}
    plain = config_from_dict({}, "test")
    assert parse(TrainConfig, ["--domain-weights", "code", "2", "my manual", "0.5"], prog="x", default=plain) == found
    assert key_of(found) != key_of(plain)
    assert differences(found, plain).keys() == {"domain_weights.code", "domain_weights.my manual"}
    for words, message in ((["code"], "must alternate"), (["code", "much"], "number")):
        with pytest.raises(ConfigError, match=message):
            parse(TrainConfig, ["--domain-weights", *words], prog="x")
    path.write_text("domain_weights: {code: much}\n")
    with pytest.raises(ConfigError, match=r"domain_weights.code: .* number"):
        config_from_yaml(path)
