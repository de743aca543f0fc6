"""What is learned for a composition, on problems whose solution is known."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import molora

WIDTH = 6


@dataclass
class Output:
    loss: Tensor | None


class Regression(nn.Module):
    """Two linear maps in a row and the distance to a target."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.9)

    def map(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(x)))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Output:
        return Output(None if y is None else (self.map(x) - y).square().mean())


def base() -> Regression:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Regression().double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two adapters of the first map and one of both."""
    root = tmp_path_factory.mktemp("loras")
    for i, targets in enumerate([["up"], ["up"], ["up", "down"]]):
        torch.manual_seed(i)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(base(), config, autocast_adapter_dtype=False)
        model.save_pretrained(root / str(i))
    return [str(root / str(i)) for i in range(3)]


def test_the_weights_that_made_the_target_are_found(folders: list[str]):
    weights = [0.9, -0.4, 0.3]
    teacher = molora.compose(base(), folders, "static", weights=weights)
    x = torch.randn(2, 40, WIDTH).double()
    with torch.no_grad():
        batches = [{"x": x, "y": teacher.base_model.model.map(x)}]
    model = base().train()
    found = molora.fit_weights(model, folders, batches, steps=300, penalty=0.0)
    assert found == pytest.approx(weights, abs=1e-2)
    assert model.training and model.drop.training and not model.up._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    shrunk = molora.fit_weights(model, folders, batches, steps=300, penalty=10.0)
    assert sum(map(abs, shrunk)) < 0.5 * sum(map(abs, weights))


def test_a_gate_opens_where_its_expert_helps(folders: list[str]):
    with_expert = molora.compose(base(), folders[:1], "static")
    x = torch.randn(64, WIDTH).double()
    wanted = x[:, 0] > 0
    with torch.no_grad():
        plain, adapted = base().eval().map(x), with_expert.base_model.model.map(x)
        y = torch.where(wanted[:, None], adapted, plain)
    gates = molora.fit_gates(base(), folders[0], [{"x": x, "y": y}], learning_rate=0.1)
    assert set(gates) == {"up"} and gates["up"].shape == (WIDTH,)
    opened = x @ gates["up"] > 0
    assert (opened == wanted).double().mean() > 0.9


def test_the_gates_go_into_a_composition(folders: list[str]):
    x = torch.randn(8, WIDTH).double()
    batches = [{"x": x, "y": torch.randn(8, WIDTH).double()}]
    gates = [molora.fit_gates(base(), f, batches, steps=3) for f in folders]
    model = molora.compose(base(), folders, "phatgoose", gates=gates)
    rows = model.base_model.model.up.molora_router["default"].prototypes
    torch.testing.assert_close(rows, torch.stack([g["up"] for g in gates]), check_dtype=False)


def inputs_of(folder: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the two maps read while that adapter is at work."""
    model = PeftModel.from_pretrained(base(), folder, autocast_adapter_dtype=False)
    with torch.no_grad():
        return x, model.eval().base_model.model.up(x)


def test_ridge_is_the_normal_equations_on_real_tokens(folders: list[str]):
    masks = [torch.rand(2, 20) < 0.7 for _ in folders]
    data = [torch.randn(2, 20, WIDTH).double() + e for e in range(3)]

    class Mapped(Regression):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Output:
            self.map(x)
            return Output(None)

    model = Mapped().double()
    model.load_state_dict(base().state_dict())
    given = [
        [{"x": x[:1], "attention_mask": m[:1]}, {"x": x[1:], "attention_mask": m[1:]}]
        for x, m in zip(data, masks, strict=True)
    ]
    rows = molora.fit_ridge(model, folders, given, ridge=0.3)
    assert [set(row) for row in rows] == [{"up"}, {"up"}, {"up", "down"}]
    for index, site in enumerate(["up", "down"]):
        read = [inputs_of(f, x)[index][m] for f, x, m in zip(folders, data, masks, strict=True)]
        X = torch.cat([torch.cat(read), torch.ones(sum(map(len, read)), 1).double()], 1)
        Y = torch.block_diag(*[torch.ones(len(part), 1) for part in read]).double()
        W = torch.linalg.lstsq(  # ridge as so many rows more
            torch.cat([X, 0.3**0.5 * torch.eye(WIDTH + 1).double()]),
            torch.cat([Y, torch.zeros(WIDTH + 1, 3).double()]),
        ).solution
        for e, row in enumerate(rows):
            if site in row:
                torch.testing.assert_close(row[site], W[:, e] / W[:, e].norm())
    mixture = molora.compose(base(), folders, "dume", gates=rows)
    router = mixture.base_model.model.up.molora_router["default"]
    assert router.temperature == 0.1 and not router.prototypes.requires_grad
    x = torch.randn(5, WIDTH).double()
    expected = torch.stack([(x @ r["up"][:-1] + r["up"][-1]) / 0.1 for r in rows], 1)
    torch.testing.assert_close(router(molora.SiteInput(x)), expected)


def test_what_is_missing_is_said(folders: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match="batches is empty"):
        molora.fit_gates(base(), folders[0], [])
    with pytest.raises(ValueError, match="gives no loss; let the batches have labels"):
        molora.fit_weights(base(), folders, [{"x": torch.zeros(1, WIDTH).double()}])
    with pytest.raises(ValueError, match="batches has 1 entries for 3 adapters"):
        molora.fit_ridge(base(), folders, [[]])
    with pytest.raises(ValueError, match="has no batch of its own"):
        molora.fit_ridge(base(), folders, [[], [], []])
    with pytest.raises(ValueError, match="trained on another base model"):
        molora.fit_gates(nn.Sequential(nn.Linear(2, 2)), folders[0], [{}])
