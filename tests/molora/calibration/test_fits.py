"""Each method against the optimum on the materialised data, found by torch.linalg.lstsq in fp64."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import molora
from molora import MoloraConfig
from molora.layer import MoloraLayer, adapted_layers

WIDTH, INNER = 6, 9
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
FIELDS: dict[str, dict[str, Any]] = {
    "top-2 and a shared expert": {"num_shared_experts": 1, "top_k": 2},
    "ranks differ": {"r": {".*": [1, 2, 3]}, "gate": "dense"},
    "one A": {"experts": "shared_a", "gate": "dense"},
    "one B": {"experts": "shared_b", "gate": "dense"},
    "the shared expert is weighed": {"gate": "convex", "num_shared_experts": 1},
    "q and k decide together": {"router_scope": "block", "gate": "top_p"},
    "rank-wise": {"rank_wise": True, "gate": "sigmoid", "top_k": 2},
}
every_adapter = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)


class Model(nn.Module):
    """Two projections of one input, one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, INNER)
        self.k_proj = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down(torch.tanh(self.q_proj(hidden)) * self.k_proj(hidden))


def build(dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    torch.manual_seed(0)
    settings = {"num_experts": 3, "r": 2, "target_modules": ["q_proj", "k_proj", "down"], **fields}
    config = MoloraConfig(**settings)
    model = get_peft_model(Model(), config, autocast_adapter_dtype=False).to(dtype)
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype)
    return model.eval()


def make_batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([[8], [5], [7]])
    return [
        {
            "hidden": torch.randn(3, 8, WIDTH, generator=generator, dtype=torch.float64).to(dtype),
            "attention_mask": (torch.arange(8) < lengths).long(),
        }
        for _ in range(count)
    ]


@dataclass
class Data:
    """What a site read and what its experts made of it, real tokens only: (T, d_in), (T, d_out)."""

    x: Tensor
    y: Tensor
    weights: Tensor  # (T, n)
    singles: Tensor  # (n, T, d_out) each weighted expert's own output
    always: Tensor  # (T, d_out) what always is on


def materialize(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Data]:
    inputs: dict[str, list[Tensor]] = {}
    layers = adapted_layers(model)
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, site=site: inputs.setdefault(site, []).append(args[0].flatten(0, 1))
        )
        for site, layer in layers.items()
    ]
    with molora.observe(model) as records, torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    real = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches])
    found = {}
    for site, layer in layers.items():
        x, weights = torch.cat(inputs[site])[real], records[site].all_weights[real]
        outputs = single_outputs(layer, x)
        n = weights.shape[1]
        singles = torch.stack(outputs[:n])
        always = torch.stack([*outputs[n:], torch.zeros_like(outputs[0])]).sum(0)
        y = torch.einsum("tn,ntd->td", weights, singles) + always
        found[site] = Data(x, y, weights, singles, always)
    return found


@torch.no_grad()
def single_outputs(layer: MoloraLayer, x: Tensor) -> list[Tensor]:
    experts: Any = layer.molora_experts["default"]
    ranks, count = experts.ranks + experts.shared_ranks, len(experts.ranks)
    A = experts.A.split(experts.block_ranks("A"), 0)
    B = experts.B.split(experts.block_ranks("B"), 1)

    def block(factor: tuple[Tensor, ...], name: str, e: int) -> Tensor:
        if experts.tied != name:
            return factor[e]
        return factor[0] if e < count else factor[e - count + 1]

    return [
        s * (x @ block(A, "A", e).T @ block(B, "B", e).T)
        for e, s in zip(range(len(ranks)), experts.scaling, strict=True)
    ]


def error(data: Data, delta: Tensor) -> float:
    return float((data.y - data.x @ delta.T).norm() / data.y.norm())


def deltas(model: Any) -> dict[str, Tensor]:
    return {
        site: la.get_delta_weight("default").detach() for site, la in adapted_layers(model).items()
    }


def calibrated(model: Any, method: str, ridge: float, rank: int | None = None) -> Any:
    return molora.calibrate(
        model, make_batches(), method, rank, ridge=ridge, held_out=[], progress=False
    )


def best_weights(data: Data, penalty: float) -> Tensor:
    n = len(data.singles)
    Z = torch.cat([data.singles.flatten(1).T, penalty**0.5 * torch.eye(n, dtype=data.x.dtype)])
    mean = data.weights.mean(0)
    target = torch.cat([(data.y - data.always).flatten(), penalty**0.5 * mean])
    # from the mean, so that of equally good weights the nearest to it are found
    return mean + torch.linalg.lstsq(Z, target - Z @ mean, driver="gelsd").solution


def best_map(data: Data, start: Tensor, ridge: float) -> Tensor:
    d_in = data.x.shape[1]
    penalty = ridge * float(data.x.square().sum()) / d_in
    X = torch.cat([data.x, penalty**0.5 * torch.eye(d_in, dtype=data.x.dtype)])
    Y = torch.cat([data.y, penalty**0.5 * start.T])
    return torch.linalg.lstsq(X, Y, driver="gelsd").solution.T


@every_adapter
@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_every_method_finds_the_optimum_and_says_how_far_it_is(fields, ridge):
    model = build(**fields)
    data = materialize(model, make_batches())
    found: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, dict[str, float]] = {}
    for method, rank in (("mean", None), ("least_squares", None), ("full", None), ("low_rank", 2)):
        report = calibrated(model, method, ridge, rank)
        found[method] = deltas(model)
        errors[method] = {site.name: site.relative_error for site in report.sites}
        assert report.tokens == sum(int(b["attention_mask"].sum()) for b in make_batches())
        if method in ("mean", "least_squares"):
            for site in report.sites:
                d, gram = data[site.name], data[site.name].singles.flatten(1)
                penalty = ridge * float((gram @ gram.T).diagonal().mean())
                expected = d.weights.mean(0) if method == "mean" else best_weights(d, penalty)
                torch.testing.assert_close(
                    torch.tensor(site.weights), expected.float(), rtol=1e-4, atol=1e-5
                )
    for site, d in data.items():
        for method, delta in found.items():
            actual = error(d, delta[site])
            assert errors[method][site] == pytest.approx(actual, rel=1e-6, abs=1e-7), method
        best = best_map(d, found["least_squares"][site], ridge)
        torch.testing.assert_close(d.x @ found["full"][site].T, d.x @ best.T, **CLOSE)
        slack = 1 + 1e-9
        assert errors["least_squares"][site] <= slack * errors["mean"][site]
        assert errors["full"][site] <= slack * errors["least_squares"][site]
        assert errors["low_rank"][site] >= errors["full"][site] / slack
        check_low_rank(d, found["low_rank"][site], best, ridge)


def check_low_rank(d: Data, delta: Tensor, best: Tensor, ridge: float) -> None:
    """Rank 2, and as near to the best map, in the (ridged) data's metric, as rank 2 can be."""
    penalty = ridge * float(d.x.square().sum()) / d.x.shape[1]
    X = torch.cat([d.x, penalty**0.5 * torch.eye(d.x.shape[1], dtype=d.x.dtype)])
    singular = torch.linalg.svdvals(X @ best.T)
    assert torch.linalg.matrix_rank(delta, atol=1e-9) == 2
    distance = (X @ (best - delta).T).norm()
    torch.testing.assert_close(distance, singular[2:].norm(), rtol=1e-6, atol=1e-8)


def test_in_fp32_the_order_of_the_methods_holds_too():
    model = build(torch.float32, top_k=2)
    batches = make_batches(dtype=torch.float32)
    means = [
        molora.calibrate(model, batches, m, held_out=[], progress=False).relative_error
        for m in ("mean", "least_squares", "full")
    ]
    assert means[0] >= means[1] >= means[2] > 0


def test_the_full_rank_loses_nothing_to_low_rank():
    model = build(top_k=2)
    full = calibrated(model, "full", 0.01)
    expected = deltas(model)
    low = calibrated(model, "low_rank", 0.01, rank=6)
    for site, delta in deltas(model).items():
        torch.testing.assert_close(delta, expected[site], **CLOSE)
    assert low.relative_error == pytest.approx(full.relative_error)


def test_weights_that_the_data_leaves_open_stay_at_the_mean():
    model = build(gate="dense")
    for layer in adapted_layers(model).values():
        layer.molora_experts["default"].B.data.zero_()
    report = calibrated(model, "least_squares", 0.0)
    data = materialize(model, make_batches())
    for site in report.sites:
        assert site.relative_error == 0
        expected = data[site.name].weights.mean(0).tolist()
        assert site.weights == pytest.approx(expected)
