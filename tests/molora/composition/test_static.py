"""Fixed weights: the weighted sum, and the weights that data gives."""

import pytest
import torch

import molora

from .dense_mixture import by_formula
from .regression import WIDTH, regression_model


@pytest.mark.parametrize("weights", [None, [0.7, -0.2, 1.5]], ids=str)
def test_static_is_the_weighted_sum_and_merges(base, folders, batch, logits_of, weights):
    numbers = weights or [1 / 3] * 3

    def formula(x, site, dense, present):
        return torch.tensor(numbers, dtype=x.dtype).expand(len(x), 3)

    expected = by_formula(base(), folders, formula, batch)
    model = molora.compose(base(), folders, "static", weights=weights)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-12, rtol=1e-12)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-12, rtol=1e-12)


def test_the_weights_that_made_the_target_are_found(regression_folders: list[str]):
    weights = [0.9, -0.4, 0.3]
    teacher = molora.compose(regression_model(), regression_folders, "static", weights=weights)
    x = torch.randn(2, 40, WIDTH).double()
    with torch.no_grad():
        batches = [{"x": x, "y": teacher.base_model.model.map(x)}]
    model = regression_model().train()
    found = molora.fit_weights(model, regression_folders, batches, steps=300, penalty=0.0)
    assert found == pytest.approx(weights, abs=1e-2)
    assert model.training and model.drop.training and not model.up._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    shrunk = molora.fit_weights(model, regression_folders, batches, steps=300, penalty=10.0)
    assert sum(map(abs, shrunk)) < 0.5 * sum(map(abs, weights))


def test_a_loss_that_is_not_a_number(base, folders):
    """A causal model predicts nothing of a row of one token."""
    row = torch.tensor([[5]])
    with pytest.raises(ValueError, match=r"loss of a batch is nan: none of its labels counts"):
        molora.fit_weights(base(), folders, [{"input_ids": row, "labels": row}])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a number above 0"),
        ({"penalty": -1}, "penalty=-1 must be a number, and not negative"),
    ],
    ids=str,
)
def test_options_that_fit_nothing(regression_folders: list[str], option: dict, said: str):
    with pytest.raises(ValueError, match=said):
        molora.fit_weights(regression_model(), regression_folders, [], **option)


def test_a_model_without_a_loss(regression_folders: list[str]):
    with pytest.raises(ValueError, match="gives no loss; let the batches have labels"):
        molora.fit_weights(
            regression_model(), regression_folders, [{"x": torch.zeros(1, WIDTH).double()}]
        )
