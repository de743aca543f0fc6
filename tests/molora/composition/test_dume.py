"""A regression on whose data a token is of."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

import molora

from .regression import WIDTH, Output, Regression, regression_model


def inputs_of(folder: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the two maps read while that adapter is at work."""
    model = PeftModel.from_pretrained(regression_model(), folder, autocast_adapter_dtype=False)
    with torch.no_grad():
        return x, model.eval().base_model.model.up(x)


def masked_model() -> nn.Module:
    """The same maps, in a model that takes a mask."""

    class Masked(Regression):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Output:
            self.map(x)
            return Output(None)

    model = Masked().double()
    model.load_state_dict(regression_model().state_dict())
    return model


def masked_data() -> tuple[list[Tensor], list[Tensor], list[list[dict[str, Tensor]]]]:
    """Masks and inputs of each adapter's data, and the same as two batches each."""
    masks = [torch.rand(2, 20) < 0.7 for _ in range(3)]
    data = [torch.randn(2, 20, WIDTH).double() + e for e in range(3)]
    given = [
        [{"x": x[:1], "attention_mask": m[:1]}, {"x": x[1:], "attention_mask": m[1:]}]
        for x, m in zip(data, masks, strict=True)
    ]
    return masks, data, given


def test_ridge_is_the_normal_equations_on_real_tokens(regression_folders: list[str]):
    masks, data, given = masked_data()
    rows = molora.fit_ridge(masked_model(), regression_folders, given, ridge=0.3)
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
    with pytest.raises(ValueError, match="ridge='x' must be a number above 0"):
        molora.fit_ridge(regression_model(), regression_folders, [[], [], []], ridge="x")
    with pytest.raises(ValueError, match="batches has 1 entries for 3 adapters"):
        molora.fit_ridge(regression_model(), regression_folders, [[]])
    with pytest.raises(ValueError, match="has no batch of its own"):
        molora.fit_ridge(regression_model(), regression_folders, [[], [], []])


def test_an_adapter_that_comes_later_is_as_if_it_had_been_there(regression_folders, tmp_path):
    """The third is the first to adapt the second map, where sums were kept for it."""
    _, _, given = masked_data()
    model = masked_model()
    joint = molora.fit_ridge(model, regression_folders, given, ridge=0.3)
    statistics = molora.RidgeStatistics(sites=["down"])
    early = molora.fit_ridge(model, regression_folders[:2], given[:2], statistics=statistics)
    assert [set(row) for row in early] == [{"up"}, {"up"}]
    statistics.save(tmp_path / "ridge.safetensors")
    statistics = molora.RidgeStatistics.load(tmp_path / "ridge.safetensors")
    later = molora.fit_ridge(
        model, regression_folders[2:], given[2:], ridge=0.3, statistics=statistics
    )
    assert statistics.sources == regression_folders
    assert [set(row) for row in later] == [{"up"}, {"up"}, {"up", "down"}]
    for row, expected in zip(later, joint, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-14, rtol=1e-12)
    assert (later[0]["up"] - early[0]["up"]).abs().max() > 1e-3  # the third changed the others


def test_statistics_that_do_not_fit(regression_folders, tmp_path):
    _, _, given = masked_data()
    model, statistics = masked_model(), molora.RidgeStatistics()
    molora.fit_ridge(model, regression_folders[:2], given[:2], statistics=statistics)
    with pytest.raises(ValueError, match=r"adapts 'down' with 6 inputs, where .*sites=\[...\]"):
        molora.fit_ridge(model, regression_folders[2:], given[2:], statistics=statistics)
    with pytest.raises(ValueError, match="sites: the model has no linear module 'side'"):
        molora.fit_ridge(
            model, regression_folders, given, statistics=molora.RidgeStatistics(["side"])
        )
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds no statistics that RidgeStatistics.save wrote"):
        molora.RidgeStatistics.load(tmp_path / "other.safetensors")
