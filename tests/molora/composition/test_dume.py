"""A regression on whose data a token is of."""

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import molora

from .regression import WIDTH, Output, Regression, regression_model


def inputs_of(folder: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the two maps read while that adapter is at work."""
    model = PeftModel.from_pretrained(regression_model(), folder, autocast_adapter_dtype=False)
    with torch.no_grad():
        return x, model.eval().base_model.model.up(x)


def test_ridge_is_the_normal_equations_on_real_tokens(regression_folders: list[str]):
    masks = [torch.rand(2, 20) < 0.7 for _ in regression_folders]
    data = [torch.randn(2, 20, WIDTH).double() + e for e in range(3)]

    class Mapped(Regression):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Output:
            self.map(x)
            return Output(None)

    model = Mapped().double()
    model.load_state_dict(regression_model().state_dict())
    given = [
        [{"x": x[:1], "attention_mask": m[:1]}, {"x": x[1:], "attention_mask": m[1:]}]
        for x, m in zip(data, masks, strict=True)
    ]
    rows = molora.fit_ridge(model, regression_folders, given, ridge=0.3)
    assert [set(row) for row in rows] == [{"up"}, {"up"}, {"up", "down"}]
    for index, site in enumerate(["up", "down"]):
        read = [
            inputs_of(f, x)[index][m]
            for f, x, m in zip(regression_folders, data, masks, strict=True)
        ]
        X = torch.cat([torch.cat(read), torch.ones(sum(map(len, read)), 1).double()], 1)
        Y = torch.block_diag(*[torch.ones(len(part), 1) for part in read]).double()
        W = torch.linalg.lstsq(  # ridge as so many rows more
            torch.cat([X, 0.3**0.5 * torch.eye(WIDTH + 1).double()]),
            torch.cat([Y, torch.zeros(WIDTH + 1, 3).double()]),
        ).solution
        for e, row in enumerate(rows):
            if site in row:
                torch.testing.assert_close(row[site], W[:, e] / W[:, e].norm())
    mixture = molora.compose(regression_model(), regression_folders, "dume", gates=rows)
    router = mixture.base_model.model.up.molora_router["default"]
    assert router.temperature == 0.1 and not router.prototypes.requires_grad
    x = torch.randn(5, WIDTH).double()
    expected = torch.stack([(x @ r["up"][:-1] + r["up"][-1]) / 0.1 for r in rows], 1)
    torch.testing.assert_close(router(molora.SiteInput(x)), expected)


def test_what_is_missing_is_said(regression_folders: list[str]):
    with pytest.raises(ValueError, match="batches has 1 entries for 3 adapters"):
        molora.fit_ridge(regression_model(), regression_folders, [[]])
    with pytest.raises(ValueError, match="has no batch of its own"):
        molora.fit_ridge(regression_model(), regression_folders, [[], [], []])
