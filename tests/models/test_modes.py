"""A model in evaluation mode for a while."""

import pytest
import torch

from remoe.models.modes import evaluating


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_even_after_an_error(training):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).train(training)

    def fails() -> None:
        with evaluating(model):
            assert not model.training
            assert not model[0].training
            assert not model(torch.ones(1, 2)).requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (model.training, model[0].training) == (training, training)
    assert model(torch.ones(1, 2)).requires_grad
