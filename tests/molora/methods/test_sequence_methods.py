"""Octavius, SMEAR and MEO from their formulas: one decision for each sequence."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

import molora
from molora import MoloraConfig


def prompt_means(site, values):
    """(batch, d) of (T, d): the mean over each row's prompt."""
    rows = zip(values.unflatten(0, site.shape), site.labels["prompt_mask"], strict=True)
    return torch.stack([row[chosen].mean(0) for row, chosen in rows])


def for_each_token(site, rows):
    """(T, E) of (batch, E)."""
    return rows.repeat_interleave(site.shape[1], 0)


def octavius(site):
    if "weights" not in site.memory:  # the first site's router decides for all
        embeddings = site.labels["inputs_embeds"].flatten(0, 1)
        p = (prompt_means(site, embeddings) @ site.p["router.weight"].T).softmax(-1)
        largest = torch.sort(p, descending=True).values
        w = p * (p >= largest[:, 1:2])
        site.memory["weights"] = for_each_token(site, w / w.sum(-1, keepdim=True))
    return site.mix(site.memory["weights"])


def test_octavius(fidelity):
    overrides = {"r": 2, "lora_dropout": 0.0, "target_modules": ["o_proj", "up_proj", "down_proj"]}
    case = fidelity(MoloraConfig.from_method("octavius", **overrides), seed=1)
    case.check(octavius)
    case.check(octavius, train=False)
    routers = {name for name in case.layers() if "router.weight" in case.tensors(name)}
    assert routers == {"layers.0.o_proj"}


def normed(values, scale):
    centred = values - values.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * scale


def smear(site):
    v = normed(prompt_means(site, site.x), site.p["router.input_scale"])
    rows = normed(site.p["router.weight"], site.p["router.weight_scale"])
    p = (v @ rows.T + site.p["router.bias"]).softmax(-1)
    if site.training:
        kept = p * (torch.rand(*p.shape, device=p.device) >= 0.1)
        p = kept / (kept.sum(-1, keepdim=True) + 1e-10)
    w = for_each_token(site, p)
    # merged: one weight for each sequence
    A, B = site.experts()
    y = []
    for row in range(site.shape[0]):
        tokens = slice(row * site.shape[1], (row + 1) * site.shape[1])
        merged = sum(w[tokens][0, e] * s * B[e] @ A[e] for e, s in enumerate(site.scaling))
        y.append(site.base()[tokens] + site.x[tokens] @ merged.T)
    return torch.cat(y)


def test_smear(fidelity):
    case = fidelity(MoloraConfig.from_method("smear", num_experts=[4, 3], r=2))
    case.check(smear)
    case.check(smear, train=False)


def meo(site):
    E = len(site.ranks)
    pooled = prompt_means(site, site.x)
    clean, spread = (pooled @ site.p["router.weight"].T).split(E, -1)
    noisy = clean
    if site.training:
        deviation = F.softplus(spread) + 0.01
        noisy = clean + deviation * torch.empty(len(clean), E, dtype=torch.float64).normal_()
    order = noisy.sort(-1, descending=True).indices
    w = torch.zeros_like(noisy)
    for row, (h, chosen) in enumerate(zip(noisy, order[:, :2], strict=True)):
        w[row, chosen] = h[chosen].softmax(-1)
    if not site.training:
        return site.mix(for_each_token(site, w))
    load = torch.zeros_like(noisy)
    normal = torch.distributions.Normal(0.0, 1.0)
    for row in range(len(noisy)):
        for e in range(E):
            others = torch.cat([noisy[row, :e], noisy[row, e + 1 :]])
            threshold = others.sort(descending=True).values[1]
            load[row, e] = normal.cdf((clean[row, e] - threshold) / deviation[row, e])

    def squared_variation(rows):
        mean = site.token_mean(for_each_token(site, rows))
        return ((mean - mean.mean()) ** 2).mean() / mean.mean() ** 2

    losses = {"importance_cv": squared_variation(w), "load_cv": squared_variation(load)}
    return site.mix(for_each_token(site, w)), losses


def test_meo(fidelity):
    case = fidelity(MoloraConfig.from_method("meo", num_experts=[5, 4], top_k=2, r=2))
    case.check(meo, tolerance=1e-8)  # of the 1e-10 beside the squared mean
    case.check(meo, train=False)


def test_meo_starts_even_and_draws_in_training(tiny_model, tiny_batch):
    model = get_peft_model(tiny_model("llama"), MoloraConfig.from_method("meo"))
    batch = {**tiny_batch("llama"), "prompt_mask": torch.ones(2, 7)}
    with molora.observe(model.train()) as records:
        model(**batch)
        model(**batch)
    for routing in records.values():
        assert (routing.logits == 0).all()
        first, second = routing.selected.view(2, 2, 7, -1)
        assert (first == first[:, :1]).all()  # one draw for a sequence
        assert (first != second).any()


@pytest.mark.parametrize("name", ["octavius", "smear", "meo"])
def test_padding_is_no_prompt(name: str, tiny_model, tiny_batch, logits_of, randomize):
    config = MoloraConfig.from_method(name, r=2)
    model = randomize(get_peft_model(tiny_model("llama"), config).eval())
    batch = tiny_batch("llama")
    one = logits_of(model, {**batch, "prompt_mask": torch.ones(2, 7)})
    two = logits_of(model, {**batch, "prompt_mask": batch["attention_mask"]})
    assert torch.equal(one, two)


def test_the_width_of_the_deciding_site_is_that_of_the_embeddings(tiny_model, tiny_batch):
    config = MoloraConfig.from_method("octavius", target_modules=["down_proj"])
    model = get_peft_model(tiny_model("llama"), config)
    batch = {**tiny_batch("llama"), "prompt_mask": torch.ones(2, 7)}
    with pytest.raises(ValueError, match=r"width 32, but the site 'model.layers.0.mlp.down_proj'"):
        model(**batch)
