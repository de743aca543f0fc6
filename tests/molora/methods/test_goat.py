"""GOAT from its formula, and its start from the base weight."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from molora import MoloraConfig
from molora.experts import EXPERTS, SiteSpec
from molora.layer import MoloraLayer


def formula(site, eta: float | None):
    A, B = site.experts()
    starts = zip(
        site.buffers["experts.initial_A"].split(site.ranks, 0),
        site.buffers["experts.initial_B"].split(site.ranks, 1),
        strict=True,
    )
    probs = (site.x @ site.p["router.weight"].T).softmax(-1)
    weights, y = torch.zeros_like(probs), site.base()
    for t, row in enumerate(probs):
        best = row.topk(2).indices
        weights[t, best] = row[best] / row[best].sum()
    for e, (A0, B0) in enumerate(starts):
        r, d_in = A0.shape
        s = 16 / r if eta is None else (3 * eta * d_in / r) ** 0.5
        y = y + s * weights[:, e, None] * (site.x @ A[e].T @ B[e].T)
        y = y - s / len(A) * (site.x @ A0.T @ B0.T)
    share = site.token_mean((weights > 0).double()) / 2
    return y, {"load_balancing": probs.shape[1] * (share * site.token_mean(probs)).sum()}


@pytest.mark.parametrize("eta", [0.5, None])
@pytest.mark.parametrize("r", [[2, 1], [[1, 2], [1, 1, 2]]], ids=["equal", "unequal"])
def test_formula(fidelity, r, eta: float | None):
    config = MoloraConfig.from_method(
        "goat",
        num_experts=[2, 3],
        r=r,
        lora_dropout=0.0,
        expert_options={"eta": eta},
        losses={"load_balancing": 0.3},
    )
    case = fidelity(config)
    for site in case.layers():
        assert all(buffer.any() for buffer in case.tensors(site, buffers=True).values())
    case.check(lambda site: formula(site, eta))


def build(weight: torch.Tensor, **options):
    d_out, d_in = weight.shape
    spec = SiteSpec(d_in, d_out, (2, 1, 2), (3,), scaling=(1.0, 2.0, 1.0, 1.0))
    experts = EXPERTS.build("svd_segments", options, spec=spec)
    experts.reset_parameters(True, lambda: weight)
    return experts


@pytest.mark.parametrize(
    ("end", "columns"), [("first", [0, 1, 3, 6, 7]), ("last", [1, 2, 5, 7, 8])]
)
def test_each_expert_starts_from_its_segment(end: str, columns: list[int]):
    torch.manual_seed(0)
    weight = torch.randn(9, 11)
    experts = build(weight, eta=None, rho=4.0, segment_end=end)
    S = torch.linalg.svdvals(weight)
    assert experts.segment == 3
    A, B = experts.A[:5], experts.B[:, :5]
    scaling = torch.tensor([1, 1, 2.0, 1, 1])
    # s B A has a fourth of the segment's singular values, and shares no direction with another's
    torch.testing.assert_close(A @ A.T, torch.diag(S[columns] / (4 * scaling)), atol=1e-5, rtol=0)
    torch.testing.assert_close(B.T @ B, torch.diag(S[columns] / (4 * scaling)), atol=1e-5, rtol=0)
    for u, column in enumerate(columns):
        image = weight @ A[u]  # A[u] is a right singular vector, B[:, u] the left one to it
        torch.testing.assert_close(
            image / image.norm(), B[:, u] / B[:, u].norm(), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(image.norm() / A[u].norm(), S[column], atol=1e-4, rtol=0)


def test_equal_weights_leave_the_output_as_it_was():
    torch.manual_seed(0)
    experts = build(torch.randn(9, 11))
    x, base = torch.randn(4, 11), torch.randn(4, 9)
    equal = torch.full((4, 3), 1 / 3)
    torch.testing.assert_close(experts(x, equal, base.clone()), base, atol=1e-5, rtol=0)
    assert experts.delta_weight(equal[0]).abs().max() < 1e-5
    uneven = torch.tensor([0.5, 0.5, 0.0])
    change = experts(x, uneven.expand(4, 3), base.clone()) - base
    assert change.abs().max() > 0.01
    torch.testing.assert_close(x @ experts.delta_weight(uneven).T, change, atol=1e-5, rtol=0)


def test_too_few_singular_values_are_refused():
    with pytest.raises(ValueError, match="has 1 singular values for each of 3 experts"):
        build(torch.randn(4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disable_save_and_load(tiny_model, tiny_batch, logits_of, tmp_path, dtype, monkeypatch):
    batch, base = tiny_batch("llama"), tiny_model("llama").to(dtype)
    expected = logits_of(base, batch)
    model = get_peft_model(base, MoloraConfig.from_method("goat", num_experts=4)).eval()
    changed = logits_of(model, batch)
    assert not torch.equal(changed, expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)
    model.save_pretrained(tmp_path)

    def no_svd(*args, **kwargs):
        raise AssertionError("loading computed an SVD")

    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    loaded = PeftModel.from_pretrained(
        tiny_model("llama").to(dtype), tmp_path, low_cpu_mem_usage=True
    ).eval()
    assert torch.equal(logits_of(loaded, batch), changed)


def test_the_correction_matches_the_experts_in_bf16():
    layer = nn.Linear(16, 16, dtype=torch.bfloat16)
    model = nn.Sequential(layer)
    config = MoloraConfig.from_method("goat", num_experts=4, target_modules=["0"])
    site = next(m for m in get_peft_model(model, config).modules() if isinstance(m, MoloraLayer))
    experts = site.molora_experts["default"]
    # PEFT rounds both to bf16 and keeps the experts in fp32: the start must cancel all the same
    assert experts.A.dtype == torch.float32
    assert torch.equal(experts.A, experts.initial_A.float())
    assert torch.equal(experts.B, experts.initial_B.float())
