"""DeepSeekMoE from its formula, the balance bias included."""

import torch

from molora import MoloraConfig

RATE, K, SCALE = 0.25, 2, 2.5


def scores(site):
    return 1 / (1 + (-site.x @ site.p["router.weight"].T).exp())


def select(site, bias):
    s = scores(site)
    return torch.zeros_like(s).scatter(1, (s + bias).topk(K).indices, 1.0)


def formula(site):
    s = scores(site)
    used = select(site, RATE * site.buffers["gate.bias.steps"])
    return site.mix(SCALE * used * s / (used * s).sum(-1, keepdim=True))


def config() -> MoloraConfig:
    return MoloraConfig.from_method(
        "deepseekmoe",
        num_experts=[4, 5],
        r=[2, 3],
        top_k=K,
        gate_options={"update_rate": RATE, "scale": SCALE},
    )


def test_formula(fidelity):
    case = fidelity(config())
    case.check(formula)
    for layer in case.layers().values():
        steps = layer.molora_gate["default"].bias.steps
        steps.copy_(torch.arange(len(steps)) % 3 - 1)
    case.check(formula)
    case.check(formula, train=False)


def test_the_bias_takes_its_step(fidelity):
    case = fidelity(config())
    case.run()
    for layer in case.layers().values():
        layer.after_step(None)
        steps = layer.molora_gate["default"].bias.steps
        assert steps.min() == -1 and steps.max() == 1
