"""THOR from its formula: one draw per module and pass, the mean at inference, and two passes."""

import torch
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint

import molora
from molora import MoloraConfig, SiteInput
from molora.gates import GATES


def formula(site):
    outputs = site.outputs()
    if not site.training:
        return site.base() + sum(outputs) / len(outputs)
    return site.base() + outputs[torch.randint(len(outputs), (1,)).item()]


def test_formula(fidelity):
    case = fidelity(MoloraConfig.from_method("thor", num_experts=[3, 4], r=[2, 3]))
    case.check(formula)
    case.check(formula, train=False)


def test_every_expert_is_drawn_equally_often_and_for_all_tokens():
    gate = GATES.build("stochastic", {}, num_experts=4, top_k=None, in_features=2)
    inputs = SiteInput(torch.zeros(3, 2))
    torch.manual_seed(0)
    passes = torch.stack([gate(torch.randn(3, 4), inputs).weights for _ in range(2000)])
    assert (passes == passes[:, :1]).all() and (passes.sum(-1) == 1).all()
    # Three deviations of a share of 2000 draws are 0.029.
    assert ((passes[:, 0].mean(0) - 0.25).abs() < 0.03).all()


def test_a_recomputed_pass_draws_the_same_expert():
    gate = GATES.build("stochastic", {}, num_experts=64, top_k=None, in_features=2)
    drawn = []

    def forward(x):
        weights = gate(torch.zeros(len(x), 64), SiteInput(x)).weights
        drawn.append(weights[0].argmax().item())
        return x * weights.sum(-1, keepdim=True)

    for reentrant in (True, False):
        drawn.clear()
        x = torch.ones(3, 2, requires_grad=True)
        y = checkpoint(forward, x, use_reentrant=reentrant)
        torch.rand(7)  # what comes after the layer draws too
        y.square().sum().backward()
        assert len(drawn) == 2 and drawn[0] == drawn[1]


def test_two_passes_disagree_until_they_are_taught(tiny_model, tiny_batch):
    config = MoloraConfig.from_method("thor", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), config).train()
    batch = tiny_batch("llama")
    one, two = model(**batch), model(**batch)
    agree = molora.consistency_loss(one.logits, two.logits, batch["attention_mask"].bool())
    assert agree > 0
    agree.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    same = molora.consistency_loss(model(**batch).logits, model(**batch).logits)
    assert same == 0
