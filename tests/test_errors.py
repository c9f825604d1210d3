"""A package that is not installed: one line that names the extra."""

import sys

import pytest

from remoe.errors import ExtraError, RemoeError, missing_extra


def test_the_error_names_what_needs_it_the_package_and_the_extra():
    error = missing_extra(ModuleNotFoundError("No module", name="lm_eval.api"), "eval", "--tasks")
    assert isinstance(error, ExtraError)
    assert isinstance(error, RemoeError)
    assert isinstance(error, ImportError)
    assert str(error) == "--tasks needs lm_eval: pip install 'remoe[eval]'"


@pytest.mark.parametrize("module", ["remoe.nothing", "json.nothing", sys.__name__, None])
def test_a_module_that_no_extra_brings_is_a_defect(module):
    error = ModuleNotFoundError("No module", name=module)
    with pytest.raises(ModuleNotFoundError) as raised:
        missing_extra(error, "lab", "this command")
    assert raised.value is error
