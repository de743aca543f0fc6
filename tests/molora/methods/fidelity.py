"""Compares a method with its formula: output, losses and every gradient, in fp64.

A test gives a configuration and a function that computes one site from the formula:

    def formula(site):
        p = (site.x @ site.p["router.weight"].T).softmax(-1)
        A, B = site.experts()
        y = site.base()
        for e in range(len(A)):
            y = y + site.scaling[e] * p[:, e, None] * (site.x @ A[e].T @ B[e].T)
        return y, {"z_loss": ...}

    fidelity(MoloraConfig.from_method("name", num_experts=[4, 3])).check(formula)

The model has two layers of `o_proj`, `gate_proj`, `up_proj` and `down_proj`, put together as in a
Llama, and every one that the configuration targets is computed by the formula in a twin of it. With
mixing="feed_forward" the last three are in a module `mlp`, and that is what the formula computes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from molora import MoloraConfig
from molora.layer import MoloraLayer
from molora.observe import routing_contexts
from molora.stats import RoutingStatistics

WIDTH, INNER = 6, 10
Formula = Callable[["Site"], Any]


class Layer(nn.Module):
    """An output projection and a gated feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.o_proj(F.rms_norm(h, (WIDTH,)))
        x = F.rms_norm(h, (WIDTH,))
        return h + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Network(nn.Module):
    """The feed-forward part as a module of its own, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, INNER)
        self.up_proj = nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NestedLayer(nn.Module):
    """An output projection and such a part."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = Network()

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.o_proj(F.rms_norm(h, (WIDTH,)))
        return h + self.mlp(F.rms_norm(h, (WIDTH,)))


class Model(nn.Module):
    """Two layers of the one or the other kind."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        layer = NestedLayer if nested else Layer
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@dataclass
class Site:
    """What a formula may use of one site, all of it in fp64.

    Attributes:
        name: "layers.0.up_proj" and so on.
        layer: 0 or 1.
        x: (T, d_in) its input.
        mask: (T,) bool, False for padding.
        shape: (batch, sequence), T = batch * sequence.
        labels: what came with the batch: "task_ids" (batch,), "prompt_mask", "modality_ids" and
            "input_ids" (batch, sequence), "inputs_embeds" (batch, sequence, width).
        p: the adapter's parameters: "experts.A", "router.weight", "gate...", as leaves.
        buffers: the adapter's buffers, by the same kind of names.
        ranks: rank of each routed expert.
        shared_ranks: rank of each shared expert.
        scaling: factor of each routed, then of each shared expert.
        memory: a dict that all sites of a pass share, for decisions that others follow.
        training: whether the pass is one of training.
        parts: of a feed-forward network, ranks and scaling of the experts (shared ones last) of
            each of its adapted modules, by name.
    """

    name: str
    layer: int
    x: Tensor
    mask: Tensor
    shape: tuple[int, int]
    labels: dict[str, Tensor]
    p: dict[str, Tensor]
    buffers: dict[str, Tensor]
    ranks: tuple[int, ...]
    shared_ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    linear: Any
    memory: dict[str, Any]
    training: bool
    parts: dict[str, tuple[tuple[int, ...], tuple[float, ...]]]

    def base(self) -> Tensor:
        """(T, d_out) W x + b."""
        return F.linear(self.x, self.linear.weight, self.linear.bias)

    def experts(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A_e (r, d_in) and B_e (d_out, r) of each expert, shared ones last."""
        ranks = self.ranks + self.shared_ranks
        return self.p["experts.A"].split(ranks, 0), self.p["experts.B"].split(ranks, 1)

    def outputs(self) -> list[Tensor]:
        """Of each expert, shared ones last: (T, d_out) its scaling times B_e A_e x."""
        A, B = self.experts()
        return [s * (self.x @ a.T @ b.T) for s, a, b in zip(self.scaling, A, B, strict=True)]

    def mix(self, weights: Tensor) -> Tensor:
        """(T, d_out) base + sum of w_e times expert e + the shared experts; weights (T, E)."""
        y, outputs = self.base(), self.outputs()
        for e, output in enumerate(outputs):
            y = y + (weights[:, e, None] * output if e < len(self.ranks) else output)
        return y

    def network(self, expert: int | None) -> Tensor:
        """(T, d_out) the feed-forward network with the merged weights of an expert, and of all
        shared ones; of the shared ones alone for None."""

        def apply(name: str, x: Tensor) -> Tensor:
            linear = self.linear.get_submodule(name)
            weight = linear.weight
            ranks, scaling = self.parts.get(name, ((), ()))
            for e, rank in enumerate(ranks):
                if e == expert or e >= len(self.ranks):
                    columns = slice(sum(ranks[:e]), sum(ranks[:e]) + rank)
                    A, B = (self.p[f"experts.linears.{name}.{factor}"] for factor in "AB")
                    weight = weight + scaling[e] * B[:, columns] @ A[columns]
            return x @ weight.T + linear.bias

        gate, up = apply("gate_proj", self.x), apply("up_proj", self.x)
        return apply("down_proj", gate / (1 + torch.exp(-gate)) * up)

    def mix_networks(self, weights: Tensor) -> Tensor:
        """(T, d_out) sum of w_e times the network of expert e; the base's where all w_e are 0."""
        y = (weights == 0).all(-1, keepdim=True) * self.network(None)
        for e in range(len(self.ranks)):
            y = y + weights[:, e, None] * self.network(e)
        return y

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean over the real tokens."""
        return values[self.mask].mean(0)


@dataclass
class Outcome:
    """What one pass gave: losses by site and name, gradients by parameter name ("x" the input)."""

    output: Tensor
    losses: dict[str, dict[str, Tensor]]
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


class Case:
    """A configuration on the two-layer model, every parameter of it random and not zero."""

    def __init__(self, config: MoloraConfig, seed: int = 0, spread: float = 0.3) -> None:
        self.config = config
        self.nested = config.mixing == "feed_forward"
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Model(self.nested)
            self.model: PeftModel = get_peft_model(model, config).double()  # type: ignore
        for parameter in self.model.parameters():
            parameter.data = spread * random(*parameter.shape)
        self.x = random(3, 5, WIDTH)
        self.mask = torch.arange(5) < torch.tensor([[5], [3], [4]])
        self.labels = {
            "task_ids": torch.tensor([0, 1, 1]),
            "prompt_mask": torch.arange(5) < torch.tensor([[3], [2], [1]]),
            "modality_ids": torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 1, 0, 1]]),
            "input_ids": torch.arange(15).view(3, 5) * 7 % 20,
            "inputs_embeds": torch.linspace(-1, 1, 90, dtype=torch.float64).view(3, 5, 6).sin(),
        }
        self.probe = random(3, 5, WIDTH) * self.mask[..., None]

    def layers(self) -> dict[str, MoloraLayer]:
        """The adapted modules by the site's name."""
        return {
            layer.molora_allocation["default"].site.name: layer
            for layer in self.model.modules()
            if isinstance(layer, MoloraLayer)
        }

    def tensors(self, site: str, buffers: bool = False) -> dict[str, Tensor]:
        """A site's parameters (or buffers) under the names of `Site.p`."""
        found: dict[str, Tensor] = {}
        layer = self.layers()[site]
        for kind in ("experts", "router", "gate"):
            parts = getattr(layer, f"molora_{kind}")
            if "default" in parts:
                part = parts["default"]
                named = part.named_buffers() if buffers else part.named_parameters()
                found.update({f"{kind}.{name}": tensor for name, tensor in named})
        return found

    def check(self, formula: Formula, train: bool = True, tolerance: float = 1e-10) -> None:
        """Assert that library and formula agree.

        Args:
            formula: computes a site: its output (T, d_out) alone or with losses by name, where the
                site makes a decision that they are about.
            train: with noise, losses and their gradients; both sides draw from the same seed.
            tolerance: relative and absolute, on output and gradients. Losses are read from fp32
                statistics, to 1e-5; their gradients are as exact as the rest.
        """
        actual, expected = self.run(train), self.run_formula(formula, train)
        close = {"atol": tolerance, "rtol": tolerance}
        torch.testing.assert_close(actual.output, expected.output, **close)
        if train:
            assert actual.losses.keys() == expected.losses.keys()
            for site, terms in expected.losses.items():
                assert actual.losses[site].keys() == terms.keys(), site
                for name, value in terms.items():
                    torch.testing.assert_close(
                        actual.losses[site][name], value, atol=1e-5, rtol=1e-5,
                        msg=lambda m, s=site, n=name: f"{n} of {s}: {m}",
                    )  # fmt: skip
        assert actual.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            ours = actual.gradients[name]
            if ours is None:  # of a router that only a loss trains, say
                assert gradient is None and not train, f"{name} is trainable but gets no gradient"
                continue
            theirs = torch.zeros_like(ours) if gradient is None else gradient
            torch.testing.assert_close(
                ours, theirs, **close, msg=lambda m, n=name: f"gradient of {n}: {m}"
            )

    def run(self, train: bool = True) -> Outcome:
        """One forward and backward of the library."""
        self.model.train(train).zero_grad()
        x = self.x.clone().requires_grad_()
        context = routing_contexts(self.model)[0]
        context.statistics = RoutingStatistics()
        torch.manual_seed(0)
        output = self.model(hidden=x, attention_mask=self.mask.long(), **self.labels)
        (output * self.probe).sum().backward()
        losses = {
            site: {name: torch.tensor(value).double() for name, value in s.losses.items()}
            for site, s in context.statistics.summarize().items()
            if s.losses
        }
        context.statistics = None
        gradients: dict[str, Tensor | None] = {"x": x.grad}
        for site in self.layers():
            for name, parameter in self.tensors(site).items():
                if parameter.requires_grad:
                    gradients[f"{site} {name}"] = parameter.grad
        return Outcome(output.detach(), losses, gradients)

    def run_formula(self, formula: Formula, train: bool = True) -> Outcome:
        """The same from the formula, in a twin that holds copies of all parameters."""
        twin = Model(self.nested).double().requires_grad_(False)
        x = self.x.clone().requires_grad_()
        leaves: dict[str, Tensor] = {"x": x}
        losses: dict[str, dict[str, Tensor]] = {}
        memory: dict[str, Any] = {}
        named = self.model.base_model.model.named_parameters()
        bare = {name.replace(".base_layer", ""): parameter for name, parameter in named}
        twin.load_state_dict({name: bare[name].detach() for name in twin.state_dict()})
        for name, layer in self.layers().items():
            p = {}
            for key, value in self.tensors(name).items():
                p[key] = value.detach().clone().requires_grad_(value.requires_grad)
                if value.requires_grad:
                    leaves[f"{name} {key}"] = p[key]
            allocation = layer.molora_allocation["default"]
            fields = {
                "name": name, "layer": allocation.site.layer, "shape": tuple(self.mask.shape),
                "mask": self.mask.flatten(), "labels": self.labels, "p": p,
                "buffers": {k: b.clone() for k, b in self.tensors(name, buffers=True).items()},
                "ranks": allocation.ranks, "shared_ranks": allocation.shared_ranks,
                "scaling": allocation.scaling, "memory": memory, "training": train,
                "parts": {
                    p.site.name.rpartition(".")[2]: (p.ranks + p.shared_ranks, p.scaling)
                    for p in allocation.parts
                },
            }  # fmt: skip
            linear = twin.get_submodule(name)
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, _Formula(formula, fields, linear, losses))
        torch.manual_seed(0)
        output = twin(x)
        total = (output * self.probe).sum()
        if train:
            coefficients = {n: c for n, (c, _) in self.config.build_losses().items()}
            for terms in losses.values():
                for name, value in terms.items():
                    total = total + coefficients[name] * value / len(losses)
        total.backward()
        detached = {s: {n: v.detach() for n, v in t.items()} for s, t in losses.items()}
        return Outcome(output.detach(), detached, {n: t.grad for n, t in leaves.items()})


class _Formula(nn.Module):
    """Stands where the adapted linear was."""

    def __init__(self, formula: Formula, fields: dict, linear: nn.Module, losses: dict) -> None:
        super().__init__()
        self.formula, self.fields, self.losses = formula, fields, losses
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.formula(Site(x=hidden.flatten(0, 1), linear=self.linear, **self.fields))
        y, terms = result if isinstance(result, tuple) else (result, {})
        if terms:
            self.losses[self.fields["name"]] = terms
        return y.unflatten(0, hidden.shape[:2])
