"""All adapters in training, few at inference."""

import pytest
import torch
import torch.nn.functional as F

import molora
from molora.losses import LOSSES

from .dense_mixture import by_formula, deltas, router_of


def test_it_is_its_formula_in_training_and_at_inference(base, folders, batch, logits_of):
    model = molora.compose(base(), folders, "lora-mixer", top_k=2, temperature=0.5)

    def soft(x, site, dense, present):
        return ((x @ router_of(model, site).weight.double().mT) / 0.5).softmax(-1)

    def hard(x, site, dense, present):
        probs = soft(x, site, dense, present)
        least = probs.sort(-1).values[:, 1:2]  # of three, two are left
        kept = torch.where(probs >= least, probs, 0)
        return kept / kept.sum(-1, keepdim=True)

    with torch.no_grad():
        for router in (router_of(model, site) for site in deltas(folders[0])):
            router.weight.normal_()
    expected = by_formula(base(), folders, hard, batch)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-10, rtol=1e-10)
    expected = by_formula(base(), folders, soft, batch)
    with torch.no_grad():
        trained = model.train()(**batch).logits
    torch.testing.assert_close(trained, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_loss_is_the_papers(base, folders, batch, sign):
    """alpha * sum of p_i f_i + sign * lambda * mean H(p), alpha = c E, lambda = c w / log E."""
    model = molora.compose(
        base(), folders, "lora-mixer", coefficient=0.2, entropy_weight=sign * 0.3
    )
    (options,) = model.peft_config["default"].losses.values()
    coefficient = options.pop("coefficient")
    loss = LOSSES.build("specialization_balance", options)
    with molora.observe(model) as records:
        model(**batch)
    for routing in records.values():
        p = routing.logits.softmax(-1)[batch["attention_mask"].bool().flatten()]
        f = F.one_hot(p.argmax(-1), 3).double().mean(0)
        entropy = -(p * p.log()).sum(-1).mean()
        lam = 0.2 * 0.3 / torch.tensor(3.0).double().log()
        expected = 0.2 * 3 * (p.mean(0) * f).sum() + sign * lam * entropy
        torch.testing.assert_close(coefficient * loss(routing, None), expected)


def test_a_weight_within_a_loss_that_is_left_out(base, folders):
    with pytest.raises(ValueError, match=r"entropy_weight=-0.1 has no effect with coefficient=0"):
        molora.compose(base(), folders, "lora-mixer", coefficient=0, entropy_weight=-0.1)


def test_the_adapters_may_train_on_and_stay_away_where_they_are_not(base, folders, batch):
    model = molora.compose(base(), folders, "lora-mixer", train_experts=True, coefficient=0)
    assert model.peft_config["default"].losses == {}
    site = "model.layers.0.self_attn.v_proj"
    experts = model.get_base_model().get_submodule(site).molora_experts["default"]
    before = experts.A.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert (experts.A[:6] != before[:6]).any() and (experts.A[6:] == 0).all()
    assert (experts.B[:, 6:] == 0).all()  # the third adapter doesn't target this module
