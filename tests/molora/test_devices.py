"""On an accelerator nothing is left on the host, and training waits for nothing.

The accelerator is torch's "meta" device, whose tensors have shapes and no numbers: an operation on
tensors of two devices raises, as on a GPU, and so does whatever reads a number on the host, for
which a GPU would have to finish first.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import molora
from molora import MoloraConfig, available_methods
from molora.experts import EXPERTS
from molora.feedforward_experts import FeedForwardExperts
from molora.gates import GATES
from molora.losses import LOSSES
from molora.observe import routing_contexts
from molora.routers import ROUTERS
from molora.stats import RoutingStatistics

from .methods.contract_exceptions import BATCH, FIT, NOT_CAUSAL
from .methods.labels import labels_for

DEVICE = "meta"
NAMES = available_methods()
MODULES = ["q_proj", "down_proj"]
# Their sites run each expert by itself, and ask the device how many a token uses (`fill_slots`).
COUNTS_EXPERTS = ["dynmole", "mixlora-dynamic"]
# What no method is made of, by the name of a test.
OTHERS: dict[str, dict[str, Any]] = {
    "arrow": {"router": "arrow", "gate": "threshold"},
    "centroid": {"router": "centroid", "router_options": {"embedding_size": 32}},
    "centroid-request": {
        "router": "centroid",
        "router_options": {"source": "request", "embedding_size": 5},
    },
    "dume": {"router": "dume"},
    "fixed": {
        "router": "random",
        "gate": "fixed",
        "gate_options": {"weights": [0.1, 0.4, 0.2, 0.3]},
    },
    "glider": {"router": "glider"},
    "glider-request": {"router": "glider", "router_options": {"description_size": 5}},
    "learned_temperature": {"router": "learned_temperature", "experts": "shared_b"},
    "mlp": {"router": "mlp", "experts": "frozen_lora"},
    "phatgoose": {"router": "phatgoose"},
    "random-numbers": {"lora_dropout": 0.1, "router_options": {"noise": 0.1, "jitter": 0.1}},
    "unequal-ranks": {
        "r": [[1, 4, 2, 3]] * 2,
        "num_shared_experts": 1,
        "shared_expert_rank": 3,
        "router_scope": "layer",
    },
    "losses": {
        "losses": {
            "expert_router_coupling": 0.1,
            "gate_balance": 0.1,
            "localized_balancing": 0.1,
            "orthogonality": 0.1,
            "renyi_entropy": 0.1,
            "specialization_balance": 0.1,
        }
    },
    "losses-sparsity": {
        "gate": "sparsegen",
        "losses": {"sparsity_budget": 0.1, "sparsity_slack": 0.1},
    },
    "losses-down_factor": {"losses": {"orthogonality": {"coefficient": 0.1, "of": "down_factor"}}},
}


class NothingCrosses(TorchDispatchMode):
    """Raises where a GPU waits and the meta device doesn't mind: where numbers go from one device
    to another, and where a mask chooses what is written to.

    A tensor of no dimension in host memory may take part: its number goes along with the call.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        copies = "copy" in func.name()
        tensors = [t for t in _tensors((*args, result)) if t.dim() or copies]
        devices = {t.device.type for t in tensors}
        assert len(devices) < 2, f"{func} goes from one device to another: {sorted(devices)}"
        if "index_put" in func.name() and any(t.dtype == torch.bool for t in _tensors(args[1])):
            assert args[2].numel() == 1, f"{func} counts what a mask chooses"
        return result


class NothingIsMade(TorchFunctionMode):
    """The same where Python's numbers are made a tensor there: a copy that no dispatcher sees."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            assert result.device.type != DEVICE, f"{func} makes a tensor of numbers of the host"
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@pytest.fixture
def attach(tiny_model, monkeypatch):
    """`attach(config)`: a new adapter on a tiny Llama that is on the accelerator."""
    # The meta device has no autocast to be asked about.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    def make(config: MoloraConfig) -> Any:
        base = tiny_model("llama", attn_implementation="eager").to(DEVICE)
        model = get_peft_model(base, config)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        assert [name for name, tensor in tensors.items() if tensor.device.type != DEVICE] == []
        return model

    return make


@pytest.fixture
def batch_for(tiny_batch):
    """`batch_for(config, **labels)`: a padded batch on the accelerator."""

    def make(config: MoloraConfig, **labels: Tensor) -> dict[str, Tensor]:
        batch = tiny_batch("llama")
        labels |= labels_for(config, batch["input_ids"], batch["attention_mask"])
        batch = {**batch, "routing_task_ids": torch.tensor([0, 1]), **labels}
        return {name: tensor.to(DEVICE) for name, tensor in batch.items()}

    return make


@torch.no_grad()
def observe(model: Any, batch: dict[str, Tensor], causal: bool = True) -> None:
    """Read a prompt, and one token after it where what has been decided is kept for that."""
    rest = {name: value for name, value in batch.items() if name != "labels"}
    with molora.observe(model.eval()) as records:
        cache = model(**rest, use_cache=causal).past_key_values
        if any(context.follows_cache for context in routing_contexts(model)):
            mask = torch.cat([rest.pop("attention_mask"), batch["attention_mask"][:, :1]], 1)
            by_token = [name for name, value in rest.items() if value.shape == (2, 7)]
            rest |= {name: torch.zeros_like(rest[name][:, :1]) for name in by_token}
            model(**rest, attention_mask=mask, past_key_values=cache, use_cache=True)
    assert {routing.weights.device.type for routing in records.values()} <= {DEVICE}


def train(model: Any, batch: dict[str, Tensor]) -> None:
    """One step, with statistics. What is made once for each device has to be there already."""
    for context in routing_contexts(model):
        context.statistics = RoutingStatistics()
    with NothingCrosses(), NothingIsMade():
        model.train()(**batch, use_cache=False).loss.backward()
        molora.after_step(model, 0.5)


def config_of(name: str) -> MoloraConfig:
    # An initialisation by the base model's weights needs numbers.
    fields = {**FIT.get(name, {}), "task_type": "CAUSAL_LM", "init_lora_weights": False}
    config = MoloraConfig.from_method(name, **fields)
    if config.mixing == "feed_forward":
        return config
    # More than two would only take longer.
    return MoloraConfig.from_method(name, **{**fields, "target_modules": MODULES})


@pytest.mark.parametrize("name", NAMES)
def test_methods(name: str, attach, batch_for):
    config = config_of(name)
    model, batch = attach(config), batch_for(config, **BATCH.get(name, {}))
    if name in COUNTS_EXPERTS:
        for experts in (m for m in model.modules() if isinstance(m, FeedForwardExperts)):
            experts.slots = len(experts.ranks)
    observe(model, batch, causal=name not in NOT_CAUSAL)
    train(model, batch)


@pytest.mark.parametrize("name", OTHERS)
def test_other_parts(name: str, attach, batch_for):
    fields = {"r": 2, "num_experts": 4, "target_modules": MODULES}
    config = MoloraConfig(task_type="CAUSAL_LM", **{**fields, **OTHERS[name]})
    model = attach(config)
    labels = {"expert_prior": torch.zeros(2, 4), "request_embeddings": torch.zeros(2, 5)}
    batch = batch_for(config, **labels)
    observe(model, batch)
    train(model, batch)


def test_all_that_is_registered_is_tested():
    configs = [config_of(name) for name in NAMES]
    configs += [MoloraConfig(**fields) for fields in OTHERS.values()]
    for registry, used in (
        (ROUTERS, {config.router for config in configs}),
        (GATES, {config.gate for config in configs}),
        (EXPERTS, {config.experts for config in configs}),
        (LOSSES, {loss for config in configs for loss in config.losses or ()}),
    ):
        ours = {n for n in registry.names() if registry.get(n).__module__.startswith("molora.")}
        assert ours - used == set()


@pytest.mark.parametrize("name", COUNTS_EXPERTS)
def test_what_counts_experts_waits(name: str, attach, batch_for):
    config = config_of(name)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        observe(attach(config), batch_for(config))
