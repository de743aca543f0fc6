"""SMoRA from its formula, bias update included."""

import torch

from molora import MoloraConfig

RATE, K = 0.25, 3


def select(site, bias):
    """Scores, and the K largest of each token."""
    scores = (site.x @ site.p["router.weight"].T).sigmoid() + bias
    return scores, torch.zeros_like(scores).scatter(1, scores.topk(K).indices, 1.0)


def formula(site):
    scores, chosen = select(site, RATE * site.buffers["gate.bias.steps"])
    # the published form: gates that sum to K, and the scale alpha / K
    gates = K * scores * chosen / (scores * chosen).sum(-1, keepdim=True)
    inner = gates * (site.x @ site.p["experts.A"].T)
    return site.base() + 16 / K * inner @ site.p["experts.B"].T


def config(**overrides) -> MoloraConfig:
    options = {"r": [6, 4], "top_k": K, "gate_options": {"update_rate": RATE}}
    return MoloraConfig.from_method("smora", **{**options, **overrides})


def test_formula(fidelity):
    case = fidelity(config())
    case.check(formula)
    for layer in case.layers().values():
        steps = layer.molora_gate["default"].bias.steps
        steps.copy_(torch.arange(len(steps)) % 3 - 1)
    case.check(formula)
    case.check(formula, train=False)


def test_the_bias_follows_the_load_of_the_whole_step(fidelity):
    case = fidelity(config())
    counts = {}

    def count(site):
        _, chosen = select(site, 0.0)
        counts[site.name] = chosen[site.mask].sum(0)
        return formula(site)

    case.run_formula(count)
    for _ in range(2):  # two micro-batches of one step
        case.run()
    case.run(train=False)
    for name, layer in case.layers().items():
        gate = layer.molora_gate["default"]
        assert (gate.bias.steps == 0).all()
        layer.after_step(0.5)
        used = counts[name]
        expected = torch.where(used < used.mean(), 1, torch.where(used > used.mean(), -1, 0))
        assert gate.bias.steps.tolist() == expected.tolist()
        layer.after_step(0.6)  # nothing was counted since
        assert gate.bias.steps.tolist() == expected.tolist()
