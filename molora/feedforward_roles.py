"""Which linear module of a feed-forward network does what, told by the names of its parts.

    h = act(W_gate x) * W_up x     or     h = act(W_up x)
    y = W_down h

Names alone could mislead, so before a network gets experts its own output is compared with this
formula (`check_roles`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .evaluating import evaluating
from .row_blocks import row_blocks

Project = Callable[[str], Tensor]
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class Roles:
    """The parts of a feed-forward network by what they do; all are names of submodules.

    Attributes:
        inputs: the linear modules that read the network's input: the gate and the up projection,
            both of them in one, or the up projection alone.
        down: the linear module that reads h.
        fused: `inputs` is one module that gives the gate's features, then the up projection's.
        dropout: the dropout, if there is one.
        drops_output: the dropout acts on y; else on h.
        activation: the activation's name, once it is known.
    """

    inputs: tuple[str, ...]
    down: str
    fused: bool = False
    dropout: str | None = None
    drops_output: bool = False
    activation: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear modules, in the order in which they run."""
        return (*self.inputs, self.down)

    def sizes(self, network: nn.Module) -> tuple[int, int]:
        """d_in and d_out."""
        first, last = getattr(network, self.inputs[0]), getattr(network, self.down)
        return _get_in_out_features(first)[0], _get_in_out_features(last)[1]  # type: ignore

    def inner(self, network: nn.Module, project: Project) -> Tensor:
        """h (..., d_inner), from a function that gives the output of an input projection by name.

        What stands between the projections works on each feature and row by itself, so rows may be
        anything: tokens, or pairs of a token and an expert.
        """
        activation = getattr(network, self.activation)
        if self.fused:
            gate, up = project(self.inputs[0]).chunk(2, -1)
            h = _gated(activation, gate, up)
        elif len(self.inputs) == 2:
            gate, up = map(project, self.inputs)
            h = _gated(activation, gate, up)
        else:
            h = activation(project(self.inputs[0]))
        if self.dropout is not None and not self.drops_output:
            h = getattr(network, self.dropout)(h)
        return h

    def project_down(self, network: nn.Module, h: Tensor) -> Tensor:
        """W_down h plus its bias, without the dropout on it."""
        down = getattr(network, self.down)
        weight = getattr(down, "weight", None)
        # T5 keeps this weight in fp32 in a 16-bit model, and casts h to it.
        if (
            weight is not None
            and weight.is_floating_point()
            and weight.dtype != h.dtype
            and not torch.is_autocast_enabled(h.device.type)
        ):
            h = h.to(weight.dtype)
        return down(h)

    def finish(self, network: nn.Module, y: Tensor) -> Tensor:
        """The dropout on y, where the network has one there."""
        return getattr(network, self.dropout)(y) if self.dropout and self.drops_output else y


LAYOUTS = (
    Roles(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo
    Roles(("gate_up_proj",), "down_proj", fused=True),  # Phi-3, GLM
    Roles(("wi_0", "wi_1"), "wo", dropout="dropout"),  # T5 v1.1
    Roles(("wi",), "wo", dropout="dropout"),  # T5
    Roles(("c_fc",), "c_proj", dropout="dropout", drops_output=True),  # GPT-2
    Roles(("fc_in",), "fc_out", dropout="dropout", drops_output=True),  # GPT-J, CodeGen
    Roles(("fc1",), "fc2"),  # ViT, CLIP, SigLIP, Phi
    Roles(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
    Roles(("up_proj",), "down_proj"),  # Nemotron
)


def find_roles(network: nn.Module) -> Roles | None:
    """The roles of a module's children, or None if it isn't a feed-forward network.

    It must have exactly the parts of one of the known layouts: a child that no role explains (a
    normalisation, say) would do something that the formula doesn't.
    """
    children = {name for name, child in network.named_children() if child is not network}
    for layout in LAYOUTS:
        if not children.issuperset(layout.linears):
            continue
        activation = next((n for n in ACTIVATIONS if callable(getattr(network, n, None))), None)
        dropout = layout.dropout if layout.dropout in children else None
        known = {*layout.linears, activation, dropout}
        if activation is not None and children <= known:
            return Roles(
                layout.inputs, layout.down, layout.fused, dropout, layout.drops_output, activation
            )
    return None


@torch.no_grad()
def check_roles(name: str, network: nn.Module, roles: Roles, features: int) -> None:
    """Compare a network's output with the formula for one token, in evaluation mode.

    Weights that aren't there yet (on the meta device, or in another process) can't be compared.

    Args:
        name: its name, for the message.
        network: the module, without adapters.
        roles: what `find_roles` made of it.
        features: d_in.

    Raises:
        ValueError: they differ.
    """
    parameters = list(network.parameters())
    if any(p.is_meta or p.numel() == 0 for p in parameters):
        return
    floating = next((p for p in parameters if p.is_floating_point()), None)
    device = parameters[0].device
    dtype = torch.get_default_dtype() if floating is None else floating.dtype
    # Not drawn at random: whoever seeds the generators doesn't expect an adapter to use them here.
    x = torch.sin(torch.arange(features, dtype=torch.float32)).to(device, dtype)[None, None]
    with evaluating(network):
        expected = network(x)
        h = roles.inner(network, lambda name: getattr(network, name)(x))
        actual = roles.project_down(network, h)
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    scale = expected.abs().max().clamp(min=1e-6)
    if actual.shape != expected.shape or not (actual - expected).abs().max() <= tolerance * scale:
        raise ValueError(
            f"mixing='feed_forward': {name!r} ({type(network).__name__}) has the parts of a "
            f"feed-forward network, {', '.join(roles.linears)}, but its output isn't "
            f"{roles.down}(act(..)) of them; use mixing='linear' for this model."
        )


def _gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up. A compiler decides for itself what to keep for the backward pass."""
    learns = isinstance(activation, nn.Module) and any(
        parameter.requires_grad for parameter in activation.parameters()
    )
    if learns or torch.compiler.is_compiling():
        return activation(gate) * up
    return _Gated.apply(activation, gate, up)


class _Gated(torch.autograd.Function):
    """Keeps gate and up, and forms act(gate) again in the backward pass.

    A network of SmolLM2's shape with 2 slots keeps 8.2 tensors of tokens x d_inner then (`saved` in
    train/feedforward_benchmark.py); autograd would keep act(gate) too, 2 more.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for rows in row_blocks(len(gate), gate.device):
            torch.mul(activation(gate[rows]), up[rows], out=h[rows])
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up)
        )
        for rows in row_blocks(len(gate), gate.device):
            part = gate[rows].detach()
            with torch.enable_grad():
                activated = ctx.activation(part.requires_grad_())
            (grad_gate[rows],) = torch.autograd.grad(activated, part, grad[rows] * up[rows])
            torch.mul(grad[rows], activated.detach(), out=grad_up[rows])
        return None, grad_gate, grad_up


def describe_parts(network: nn.Module) -> str:
    """What a module is made of, for messages about one that isn't recognised."""
    children = ", ".join(f"{n} ({type(c).__name__})" for n, c in network.named_children())
    return f"{type(network).__name__} of {children}"
