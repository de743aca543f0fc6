"""A tiny Llama with experts, its twin in plain formulas, and a probe that sits in a trainer.

Everything runs in fp64, but for the model's norms, which round to fp32: what an auxiliary loss
adds to a gradient is the difference of two runs, with the loss and without it, and must be the
twin's gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from molora import MoloraConfig

VOCABULARY = 48
NUM_EXPERTS = 4
TOP_K = 2
RANK = 2
ALPHA = 6.0
LEADERS = {
    "site": {},
    "block": {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"},
    "layer": dict.fromkeys(
        ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "q_proj"
    ),
}
Losses = dict[str, float]
Gradients = dict[str, Tensor]


def tiny_llama() -> LlamaForCausalLM:
    """Always the same weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double()


def tiny_config(losses: Losses | None = None, **overrides: Any) -> MoloraConfig:
    """Experts on all seven linears; B starts random, so that gradients reach everything."""
    settings: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "losses": losses or {},
        "task_type": "CAUSAL_LM",
    }
    return MoloraConfig(**{**settings, **overrides})


def routed_llama(losses: Losses | None = None, **overrides: Any) -> PeftModel:
    """Always the same weights, whatever the losses."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(tiny_llama(), tiny_config(losses, **overrides)).train()


def checkpoint(model: PeftModel, reentrant: bool) -> None:
    """Recompute each layer in backward."""
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})


def token_batch(rows: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `labels` without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def padded(batch: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    """The same sequences with that many padded positions before and behind them."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {k: nn.functional.pad(v, (left, right), value=fill[k]) for k, v in batch.items()}


def ragged_batch(seed: int = 0) -> dict[str, Tensor]:
    """Three sequences of 2, 4 and 7 tokens, padded on the right."""
    batch = token_batch(seed=seed)
    keep = torch.arange(7) < torch.tensor([[2], [4], [7]])
    batch["attention_mask"] = keep.long()
    batch["labels"] = batch["labels"].masked_fill(~keep, -100)
    return batch


class TwinSite(nn.Module):
    """A site, expert by expert: y = W x + alpha / r * sum over e of w_e B_e A_e x."""

    def __init__(self, base: nn.Linear, parameters: dict[str, Tensor], name: str, leader: str):
        super().__init__()
        self.weight, self.name, self.leader = base.weight.detach(), name, leader
        self.factors = nn.ParameterDict(
            {key: nn.Parameter(value.detach().clone()) for key, value in parameters.items()}
        )
        self.decisions: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.leader == self.name:
            logits = rows @ self.factors["router"].T
            probs = logits.softmax(-1)
            largest = probs.sort(descending=True, stable=True).indices[:, :TOP_K]
            chosen = torch.zeros_like(probs).scatter(1, largest, 1.0)
            weights = probs * chosen / (probs * chosen).sum(-1, keepdim=True)
            self.decisions[self.name] = (logits, probs, weights)
        weights = self.decisions[self.leader][2]
        A = self.factors["A"].unflatten(0, (NUM_EXPERTS, RANK))
        B = self.factors["B"].unflatten(1, (NUM_EXPERTS, RANK))
        y = rows @ self.weight.T
        for e in range(NUM_EXPERTS):
            y = y + ALPHA / RANK * weights[:, e, None] * (rows @ A[e].T @ B[:, e].T)
        return y.unflatten(0, x.shape[:-1])


class Twin:
    """The decoder of a routed model, rebuilt from the values of its parameters alone."""

    def __init__(self, model: nn.Module, scope: str = "site", adapter: str = "default"):
        self.decoder = tiny_llama().model.train().requires_grad_(False)
        self.decisions: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.parameters: Gradients = {}
        found = {site_parameter(n, adapter): p for n, p in model.named_parameters()}
        for index, layer in enumerate(self.decoder.layers):
            for parent in (layer.self_attn, layer.mlp):
                for child, base in list(parent.named_children()):
                    if isinstance(base, nn.Linear):
                        names = (f"{index}.{child}", f"{index}.{LEADERS[scope].get(child, child)}")
                        values = {k[1]: v for k, v in found.items() if k and k[0] == names[0]}
                        site = TwinSite(base, values, *names)
                        site.decisions = self.decisions
                        setattr(parent, child, site)
                        for key, value in site.factors.items():
                            self.parameters[f"{names[0]}.{key}"] = value

    def run(self, call: dict[str, Any]) -> Tensor:
        """The decoder's forward on what the trainer passed to the model; the hidden states."""
        self.decisions.clear()
        read = ("input_ids", "attention_mask", "position_ids")
        inputs = {name: call[name] for name in read if call.get(name) is not None}
        return self.decoder(**inputs, use_cache=False).last_hidden_state

    def losses(self, call: dict[str, Any]) -> dict[str, list[Tensor]]:
        """Each loss, decision by decision, over the tokens that the mask keeps."""
        self.run(call)
        mask = call.get("attention_mask")
        found: dict[str, list[Tensor]] = {"load_balancing": [], "z_loss": []}
        for logits, probs, weights in self.decisions.values():
            keep = torch.ones(len(logits)) if mask is None else mask.flatten()
            real = keep.bool()
            used = (weights[real] > 0).double().mean(0)
            balance = NUM_EXPERTS / TOP_K * (used * probs[real].mean(0)).sum()
            found["load_balancing"].append(balance)
            found["z_loss"].append(logits[real].exp().sum(-1).log().pow(2).mean())
        return found

    def gradient(self, calls: list[dict[str, Any]], coefficients: Losses) -> Gradients:
        """Of the mean over the calls of the coefficients times the mean over decisions."""
        total = torch.zeros((), dtype=torch.float64)
        for call in calls:
            for name, terms in self.losses(call).items():
                mean = torch.stack(terms).mean()
                total = total + coefficients.get(name, 0.0) * mean / len(calls)
        names, values = list(self.parameters), list(self.parameters.values())
        gradients = torch.autograd.grad(total, values, allow_unused=True, materialize_grads=True)
        return dict(zip(names, gradients, strict=True))


def site_parameter(name: str, adapter: str = "default") -> tuple[str, str] | None:
    """("layer.module", "A" | "B" | "router") of a parameter of that adapter, else None."""
    head, found, tail = name.partition(".molora_")
    kind, _, rest = tail.partition(f".{adapter}.")
    if not found or not rest:
        return None
    parts = head.split(".")
    site = f"{parts[parts.index('layers') + 1]}.{parts[-1]}"
    return site, "router" if kind == "router" else rest


def gradients(model: nn.Module, adapter: str = "default") -> Gradients:
    """The gradients that the model holds now, by the twin's names."""
    found = {}
    for name, parameter in model.named_parameters():
        key = site_parameter(name, adapter)
        if key is not None:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[".".join(key)] = parameter.grad.clone()
    return found


class Probe(TrainerCallback):
    """Keeps, for each optimizer step, the model's inputs and the gradients before the step."""

    def __init__(self, adapter: str = "default") -> None:
        self.adapter = adapter
        self.windows: list[list[dict[str, Any]]] = []
        self.gradients: list[Gradients] = []
        self._calls: list[dict[str, Any]] = []

    def listen(self, base_model: nn.Module) -> None:
        base_model.register_forward_pre_hook(self._record, with_kwargs=True, prepend=True)

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            assert not args
            self._calls.append(dict(kwargs))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.windows.append(self._calls)
        self._calls = []
        self.gradients.append(gradients(model, self.adapter))


def check_added_gradient(
    run: Callable[[Losses], Probe], twin: Twin, coefficients: Losses, windows: int
) -> Probe:
    """In every window, runs with and without the losses differ by the twin's gradient."""
    with_losses, without = run(coefficients), run({})
    assert len(with_losses.windows) == len(without.windows) == windows
    for step, calls in enumerate(with_losses.windows):
        expected = twin.gradient(calls, coefficients)
        check_difference(with_losses.gradients[step], without.gradients[step], expected)
    return with_losses


def check_difference(with_losses: Gradients, without: Gradients, expected: Gradients) -> None:
    """`with_losses - without == expected`, and there was something to compare."""
    assert with_losses.keys() == without.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-4
    for name, gradient in expected.items():
        added = with_losses[name] - without[name]
        torch.testing.assert_close(
            added, gradient, rtol=1e-5, atol=1e-6 * largest, msg=lambda m, name=name: f"{name}: {m}"
        )
