"""The layer against its formula, written out token by token and expert by expert in fp64.

y = W x + sum over routed e of w_e s_e B_e A_e x + sum over shared e of s_e B_e A_e x
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from molora.layer import MoloraLayer

from .cases import Case, every_case

P, TOP_K = 0.6, {"top_k": 2, "top_k_unnormalized": 1, "switch": 1, "sigmoid": 3}


def routing_weights(case: Case, z: Tensor, layer: int) -> list[Any]:
    """w_e of one token with logits z (E,), None where the expert takes no part."""
    e = range(len(z))
    p = [z[i].exp() / sum(z[j].exp() for j in e) for i in e]
    values = z.detach().tolist()
    by_score = sorted(e, key=lambda i: (-values[i], i))
    k = case.fields.get("top_k", TOP_K.get(case.gate, 0))
    chosen = by_score[: k[layer] if isinstance(k, list) else k]
    scores = p
    if case.gate == "dense":
        chosen = list(e)
    elif case.gate == "top_p":
        chosen = [i for rank, i in enumerate(by_score) if sum(p[j] for j in by_score[:rank]) < P]
    elif case.gate == "threshold":
        chosen = [i for i in e if p[i] >= 1 / len(z)]
    elif case.gate == "sigmoid":
        scores = [1 / (1 + (-z[i]).exp()) for i in e]
    normalised = case.gate in ("top_k", "sigmoid", "threshold")
    total = sum(scores[i] for i in chosen) if normalised else 1.0
    return [scores[i] / total if i in chosen else None for i in e]


def logits(case: Case, router: Any, token: Tensor) -> Tensor:
    options = case.fields.get("router_options", {})
    z = router.weight.to(token.dtype) @ token
    if options.get("bias"):
        z = z + router.bias.to(token.dtype)
    return z / options.get("temperature", 1.0)


def expert_sum(case: Case, layer: Any, number: int, tokens: Tensor, weights: list[Any]) -> Tensor:
    """(T, d_out) of all experts of one site; `weights` holds one list per token."""
    A, B = (getattr(layer.molora_experts["default"], n).to(tokens.dtype) for n in "AB")
    ranks = case.ranks[number]
    rows = []
    for token, w in zip(tokens, weights, strict=True):
        y, start = torch.zeros(len(B), dtype=tokens.dtype), 0
        for e, rank in enumerate(ranks + case.shared):
            block = slice(start, start + rank)
            factor = w[e] if e < len(ranks) and len(ranks) > 1 else 1.0
            if factor is not None:
                y = y + factor * case.scaling(rank) * (B[:, block] @ (A[block] @ token))
            start += rank
        assert start == len(A)
        rows.append(y)
    return torch.stack(rows)


class Formula:
    """Replaces every MoLoRA layer's forward in a model by the formula, decisions included."""

    def __init__(self, case: Case, model: Any) -> None:
        self.case = case
        # (layer, deciding module) -> logits (E,) and weights, one per token
        self.decisions: dict[tuple[int, str], tuple[list[Tensor], list[Any]]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, MoloraLayer):
                number, _, module = name.partition("layers.")[2].split(".")
                layer.forward = self.forward_of(layer, int(number), module)

    def forward_of(self, layer: Any, number: int, module: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            tokens = x.reshape(-1, x.shape[-1])
            weights = self.weights(layer, number, module, tokens)
            update = expert_sum(self.case, layer, number, tokens, weights)
            return layer.base_layer(x) + update.view(*x.shape[:-1], -1)

        return forward

    def weights(self, layer: Any, number: int, module: str, tokens: Tensor) -> list[Any]:
        if len(self.case.ranks[number]) == 1 or not self.case.is_routed:
            return [[] for _ in tokens]
        key = number, self.case.decides(module)
        if key not in self.decisions:
            assert key[1] == module, "the deciding module must run first"
            z = [logits(self.case, layer.molora_router["default"], token) for token in tokens]
            w = [routing_weights(self.case, token, number) for token in z]
            self.decisions[key] = z, w
        return self.decisions[key][1]

    def auxiliary_loss(self, mask: Tensor) -> Tensor:
        """Sum over losses of coefficient * mean over decisions; padding doesn't count."""
        real = [t for t, counts in enumerate(mask.flatten().tolist()) if counts]
        total = torch.zeros((), dtype=torch.float64)
        for z, w in self.decisions.values():
            terms = self.terms([z[t] for t in real], [w[t] for t in real])
            for name, coefficient in self.case.losses.items():
                total = total + coefficient * terms[name] / len(self.decisions)
        return total

    def terms(self, z: list[Tensor], w: list[Any]) -> dict[str, Tensor]:
        experts = range(len(z[0]))
        if self.case.gate == "sigmoid":
            scores = [token.sigmoid() / token.sigmoid().sum() for token in z]
        else:
            scores = [token.softmax(0) for token in z]
        used = [sum(token[e] is not None for token in w) / len(z) for e in experts]
        probability = [sum(token[e] for token in scores) / len(z) for e in experts]
        products = sum(f * q for f, q in zip(used, probability, strict=True))
        return {
            "load_balancing": len(experts) / sum(used) * products,
            "z_loss": sum(token.exp().sum().log() ** 2 for token in z) / len(z),
        }


@every_case
def test_forward_and_gradients_equal_the_formula(case: Case, tiny_model, tiny_batch, randomize):
    base = tiny_model("llama").double()
    model = randomize(get_peft_model(base, case.config(losses=case.losses))).train()
    twin = copy.deepcopy(model)
    formula = Formula(case, twin)
    batch = tiny_batch("llama")

    output, expected = model(**batch), twin(**batch)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-6, rtol=1e-6)
    output.loss.backward()
    (expected.loss + formula.auxiliary_loss(batch["attention_mask"])).backward()
    reference = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, reference[name].grad, atol=1e-7, rtol=1e-5, msg=name
            )


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@every_case
def test_a_bf16_layer_is_close_to_fp64(
    case: Case, tiny_model, tiny_batch, randomize, adapter_dtype: torch.dtype
):
    base = tiny_model("llama").bfloat16()
    model = get_peft_model(
        base, case.config(), autocast_adapter_dtype=adapter_dtype == torch.float32
    )
    randomize(model).eval()
    twin = copy.deepcopy(model)
    seen: list[tuple[str, Tensor, Tensor]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, MoloraLayer):
            assert layer.molora_experts["default"].A.dtype == adapter_dtype
            layer.register_forward_hook(
                lambda _, args, output, name=name: seen.append((name, args[0], output))
            )
    with torch.no_grad():
        model(**tiny_batch("llama"))
    formula = Formula(case, twin)
    for name, x, output in seen:
        layer = twin.get_submodule(name)
        layer.base_layer.double()
        exact = layer.forward(x.double())
        assert output.dtype == torch.bfloat16
        # bf16 keeps 8 bits: a part in 256 of the largest terms, for the base layer and the experts
        tolerance = 2e-2 * exact.abs().max().item()
        torch.testing.assert_close(output.double(), exact, atol=tolerance, rtol=1e-2, msg=name)
    assert formula.decisions or not case.is_routed
