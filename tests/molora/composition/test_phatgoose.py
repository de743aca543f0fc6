"""Gates that are trained with the adapters."""

import pytest
import torch
from torch import nn

import molora

from .dense_mixture import by_formula, phatgoose_scores, random_gates, top_2
from .regression import WIDTH, regression_model


def test_phatgoose_is_its_formula(base, folders, batch, logits_of):
    gates = random_gates(folders)

    def formula(x, site, dense, present):
        return top_2(phatgoose_scores(x, site, gates), present)

    expected = by_formula(base(), folders, formula, batch)
    model = molora.compose(base(), folders, "phatgoose", gates=gates)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-10, rtol=1e-10)


def test_a_gate_opens_where_its_expert_helps(regression_folders: list[str]):
    with_expert = molora.compose(regression_model(), regression_folders[:1], "static")
    x = torch.randn(64, WIDTH).double()
    wanted = x[:, 0] > 0
    with torch.no_grad():
        plain, adapted = regression_model().eval().map(x), with_expert.base_model.model.map(x)
        y = torch.where(wanted[:, None], adapted, plain)
    gates = molora.fit_gates(
        regression_model(), regression_folders[0], [{"x": x, "y": y}], learning_rate=0.1
    )
    assert set(gates) == {"up"} and gates["up"].shape == (WIDTH,)
    opened = x @ gates["up"] > 0
    assert (opened == wanted).double().mean() > 0.9


def test_the_gates_go_into_a_composition(regression_folders: list[str]):
    x = torch.randn(8, WIDTH).double()
    batches = [{"x": x, "y": torch.randn(8, WIDTH).double()}]
    gates = [molora.fit_gates(regression_model(), f, batches, steps=3) for f in regression_folders]
    model = molora.compose(regression_model(), regression_folders, "phatgoose", gates=gates)
    rows = model.base_model.model.up.molora_router["default"].prototypes
    torch.testing.assert_close(rows, torch.stack([g["up"] for g in gates]), check_dtype=False)


def test_what_is_missing_is_said(regression_folders: list[str]):
    with pytest.raises(ValueError, match="batches is empty"):
        molora.fit_gates(regression_model(), regression_folders[0], [])
    with pytest.raises(ValueError, match="trained on another base model"):
        molora.fit_gates(nn.Sequential(nn.Linear(2, 2)), regression_folders[0], [{}])
