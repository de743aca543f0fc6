"""torch.compile sees one graph, losses and shared decisions included, and changes no number."""

import pytest
import torch

from .routed_twin import gradients, ragged_batch, routed_llama

# Dynamo instantiates autograd functions while it traces them.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
LOSSES = {"load_balancing": 3.0, "z_loss": 0.5}


@pytest.mark.parametrize("scope", [pytest.param("site", marks=pytest.mark.slow), "block"])
def test_compiled_equals_eager(scope: str):
    batch, modules = ragged_batch(), ["q_proj", "k_proj", "o_proj"]
    plain, compiled = (
        routed_llama(LOSSES, router_scope=scope, target_modules=modules) for _ in range(2)
    )
    expected = plain(**batch)
    expected.loss.backward()
    torch.compiler.reset()
    found = torch.compile(compiled, backend="aot_eager", fullgraph=True)(**batch)
    found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, gradients(plain)[name])
