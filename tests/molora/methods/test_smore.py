"""S'MoRE from its formula, node by node."""

import pytest
import torch
from torch import Tensor

from molora import MoloraConfig
from molora.experts import EXPERTS, SiteSpec

SMALL = {"depth": 2, "hidden_size": 5, "key_size": 3}


def chosen(z: Tensor, followed: int) -> tuple[Tensor, Tensor]:
    """One token's p, and the weights of the likeliest branches."""
    p = z.softmax(-1)
    kept = torch.zeros_like(p)
    kept[p.topk(followed).indices] = 1
    return p, p * kept / (p * kept).sum()


def linear(p: dict, name: str, u: Tensor) -> Tensor:
    return p[f"router.{name}.weight"] @ u + p[f"router.{name}.bias"]


def of_token(site, x: Tensor, s: int, r: int, followed: int, phi) -> tuple[Tensor, Tensor, Tensor]:
    """A token's update, and the weights and probabilities of its paths."""
    p, scale = site.p, site.scaling[0]
    keys, down = p["router.keys"], linear(p, "down", x)
    query = linear(p, "second.0", torch.tanh(linear(p, "first.0", down)))
    top_p, top_w = chosen(keys[0] @ query, followed)
    root, weights, probs = 0, [], []
    leaves = []
    for m in range(s):
        A, a = p["experts.A"][0, r * m : r * (m + 1)], p["experts.a"][0, r * m : r * (m + 1)]
        leaves.append(phi(scale * (p["experts.B.0"][m] @ (A @ x + a) + p["experts.b.0"][m])))
    for n in range(s):
        u = torch.cat([down, keys[0, n]])
        query = linear(p, "second.1", torch.tanh(linear(p, "first.1", u)))
        low_p, low_w = chosen(keys[1] @ query, followed)
        below = sum(low_w[m] * leaves[m] for m in range(s))
        A, a = p["experts.A"][1, r * n : r * (n + 1)], p["experts.a"][1, r * n : r * (n + 1)]
        own = scale * (p["experts.B.1"][n] @ (A @ x + a) + p["experts.b.1"][n])
        root = root + top_w[n] * phi(own + p["experts.W.0"] @ below + p["experts.c.0"])
        weights.append(top_w[n] * low_w)
        probs.append(top_p[n] * low_p)
    return p["experts.P"] @ root + p["experts.p"], torch.cat(weights), torch.cat(probs)


@pytest.mark.parametrize(
    ("top_k", "activation"), [(4, "tanh"), (9, "relu"), (4, "identity")], ids=str
)
def test_formula(fidelity, top_k: int, activation: str):
    phi = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda v: v}[activation]

    def formula(site):
        followed = 2 if top_k == 4 else 3
        tokens = [of_token(site, x, 3, 2, followed, phi) for x in site.x]
        update, weights, probs = (torch.stack(values) for values in zip(*tokens, strict=True))
        used = (weights > 0).double()
        fraction = site.token_mean(used) / top_k
        loss = 9 * (fraction * site.token_mean(probs)).sum()
        return site.base() + update, {"load_balancing": loss} if top_k == 4 else {}

    config = MoloraConfig.from_method(
        "smore", num_experts=9, top_k=top_k, r=2, lora_alpha=1.5, router_options=SMALL,
        expert_options={"depth": 2, "activation": activation},
        losses={"load_balancing": 0.3} if top_k == 4 else {},
    )  # fmt: skip
    fidelity(config).check(formula)


def build(count: int, depth: int, activation: str):
    spec = SiteSpec(5, 4, (2,) * count, (), scaling=(1.0,) * count)
    experts = EXPERTS.build("residual_tree", {"depth": depth, "activation": activation}, spec=spec)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts.double()


def test_a_flat_tree_without_activation_is_a_mixture_of_lora_experts():
    experts = build(3, 1, "identity")
    x, weights = torch.randn(6, 5).double(), torch.rand(6, 3).double()
    actual = experts(x, weights, torch.zeros(6, 4).double())
    expected = experts.p.expand(6, 4)
    for e in range(3):
        rows = slice(2 * e, 2 * e + 2)
        inner = x @ experts.A[0, rows].T + experts.a[0, rows]
        node = inner @ experts.B[0][e].T + experts.b[0][e]
        expected = expected + weights[:, e, None] * (node @ experts.P.T)
    torch.testing.assert_close(actual, expected)


def test_a_token_without_a_path_gets_the_last_bias_alone():
    experts = build(4, 2, "tanh")
    weights = torch.zeros(2, 4).double()
    weights[1, 3] = 0.5  # one path of four
    y = experts(torch.randn(2, 5).double(), weights, torch.zeros(2, 4).double())
    torch.testing.assert_close(y[0], experts.p)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in experts.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 10}, "10 experts are not the paths of a tree"),
        ({"top_k": 3}, "top_k=3 is not a number of paths, such as 4 or 16"),
        ({"top_k": 1}, "top_k=1"),
        ({"expert_options": {"activation": "gelu"}}, "unknown expert option activation 'gelu'"),
        ({"expert_options": {"depth": 0}}, "depth=0 must be at least 1"),
        ({"router_options": {"depth": 3}}, "depth=3 must be 1 or 2"),
        ({"router_options": {"key_size": 0}}, "key_size=0 must be at least 1"),
    ],
)
def test_what_is_no_tree_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoloraConfig.from_method("smore", **fields)
