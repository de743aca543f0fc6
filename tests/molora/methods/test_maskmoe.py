"""MaskMoE from its formula, and its masks."""

import pytest
import torch
from peft import get_peft_model

from molora import MoloraConfig
from molora.routers import TokenMaskRouter

OPTIONS = {"frequent": 3, "rare": 1, "frequent_ids": 10}


def visible_of(ids, experts: int, salt: int) -> torch.Tensor:
    """splitmix64's finaliser with Python's integers, and the least values of each id."""
    low = (1 << 64) - 1
    mask = torch.zeros(len(ids), experts, dtype=torch.bool)
    for row, token in enumerate(ids.tolist()):
        draws = []
        for e in range(experts):
            z = (token * experts + e + (salt << 32)) & low
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & low
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & low
            z ^= z >> 31
            draws.append(z - (1 << 64) if z >> 63 else z)
        count = OPTIONS["frequent"] if token < OPTIONS["frequent_ids"] else OPTIONS["rare"]
        mask[row, sorted(range(experts), key=draws.__getitem__)[:count]] = True
    return mask


def formula(site):
    E = len(site.ranks)
    ids = site.labels["input_ids"].flatten()
    mask = visible_of(ids, E, int(site.buffers["router.salt"]))
    z = site.x @ site.p["router.weight"].T
    p = (z.exp() * mask) / (z.exp() * mask).sum(-1, keepdim=True)
    largest = p.sort(-1, descending=True).values[:, 1:2]
    chosen = (p >= largest) & (p > 0)
    w = p * chosen
    used = site.token_mean(chosen.double())
    loss = E / used.sum() * (used.detach() * site.token_mean(p)).sum()
    return site.mix(w / w.sum(-1, keepdim=True)), {"load_balancing": loss}


def test_formula(fidelity):
    config = MoloraConfig.from_method("maskmoe", r=2, num_experts=[4, 5], router_options=OPTIONS)
    fidelity(config).check(formula)


def router(experts: int = 8, **options) -> TokenMaskRouter:
    built = TokenMaskRouter(4, experts, **{**OPTIONS, **options})
    built.reset_parameters()
    return built


def test_masks_are_drawn_evenly_and_apart():
    torch.manual_seed(0)
    one, two = router(rare=2, frequent_ids=0), router(rare=2, frequent_ids=0)
    ids = torch.arange(20_000)
    for mask in (one.visible(ids), two.visible(ids)):
        assert (mask.sum(-1) == 2).all()
        # 2 of 8, with a standard deviation of 0.003 over 20000 draws
        assert (mask.float().mean(0) - 0.25).abs().max() < 0.015
        pairs = (mask.float().T @ mask.float()) / len(ids)
        expected = torch.full((8, 8), 1 / 28).fill_diagonal_(0.25)
        assert (pairs - expected).abs().max() < 0.015
    agree = (one.visible(ids) == two.visible(ids)).all(-1).float().mean()
    assert abs(agree - 1 / 28) < 0.01


def test_more_experts_than_there_are():
    assert router(experts=2).visible(torch.tensor([3, 30])).sum(-1).tolist() == [2, 1]


def test_it_asks_for_ids(tiny_model):
    model = get_peft_model(tiny_model("llama"), MoloraConfig.from_method("maskmoe"))
    with pytest.raises(ValueError, match="'token_mask' needs .*input_ids instead of"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_wrong_options():
    for option in ("frequent", "rare"):
        with pytest.raises(ValueError, match=f"{option}=0 must be at least 1"):
            MoloraConfig.from_method("maskmoe", router_options={option: 0})
    with pytest.raises(ValueError, match="frequent_ids=-1 must not be negative"):
        MoloraConfig.from_method("maskmoe", router_options={"frequent_ids": -1})
