"""Whole feed-forward networks mixed (mixing="feed_forward"): against the networks' formula."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import molora
from molora.composition import COMPOSERS, plan_composition

from .dense_mixture import deltas

LINEARS = ("gate_proj", "up_proj", "down_proj")
# Unlike ranks and scalings; the third adapts the first layer's network alone, and no attention.
SPECS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", *LINEARS]},
    {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["up_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 6, "target_modules": list(LINEARS), "layers_to_transform": [0]},
]


@pytest.fixture(scope="module")
def networks(base, save_loras, tmp_path_factory) -> list[str]:
    return save_loras(base, SPECS, tmp_path_factory.mktemp("networks"))


def fine_tuned(model: Any, seed: int) -> Any:
    """The model with other weights in its feed-forward networks."""
    torch.manual_seed(seed)
    for layer in model.model.layers:
        for name in LINEARS:
            weight = getattr(layer.mlp, name).weight
            weight.data += 0.1 * torch.randn_like(weight)
    return model


def by_formula(model: Any, folders: list[str], weights_of: Any, batch: dict) -> Tensor:
    """Each network's output is the sum of w_e FFN_e(x); elsewhere what each adapter adds is mixed.

    `weights_of(site, x (T, d))` gives (T, E).
    """
    experts = [deltas(folder) for folder in folders]

    def network(site: str) -> Any:
        def run(mlp: Any, args: tuple, output: Tensor) -> Tensor:
            x = args[0].flatten(0, 1)
            weights, y = weights_of(site, x), 0
            for e, expert in enumerate(experts):
                W = {name: getattr(mlp, name).weight for name in LINEARS}
                W = {name: w + expert.get(f"{site}.{name}", 0) for name, w in W.items()}
                h = F.silu(x @ W["gate_proj"].T) * (x @ W["up_proj"].T)
                y = y + weights[:, e, None] * (h @ W["down_proj"].T)
            return y.view_as(output)

        return run

    def linear(site: str) -> Any:
        def run(module: Any, args: tuple, output: Tensor) -> Tensor:
            x = args[0].flatten(0, 1)
            weights = weights_of(site, x)
            for e, expert in enumerate(experts):
                if site in expert:
                    added = weights[:, e, None] * (x @ expert[site].T)
                    output = output + added.view_as(output)
            return output

        return run

    for i in range(2):
        model.get_submodule(f"model.layers.{i}.mlp").register_forward_hook(
            network(f"model.layers.{i}.mlp")
        )
        for name in ("q_proj", "v_proj"):
            site = f"model.layers.{i}.self_attn.{name}"
            model.get_submodule(site).register_forward_hook(linear(site))
    with torch.no_grad():
        return model(**batch).logits


def test_static_weights_mix_the_networks_outputs(base, networks, batch, logits_of):
    given = torch.tensor([0.5, 0.2, 0.3]).double()
    model = molora.compose(
        base(), networks, "static", mixing="feed_forward", weights=given.tolist()
    )
    expected = by_formula(base(), networks, lambda site, x: given.expand(len(x), 3), batch)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-6, atol=1e-6)
    by_module = molora.compose(base(), networks, "static", weights=given.tolist())
    assert (logits_of(by_module, batch) - expected).abs().max() > 1e-2  # it is another mixture


def test_a_router_decides_once_for_a_network(base, networks, batch, logits_of, tmp_path):
    model = molora.compose(base(), networks, "linear", mixing="feed_forward")
    routers = {
        name.removeprefix("base_model.model.").partition(".molora_router")[0]: value.double()
        for name, value in model.named_parameters()
        if "molora_router" in name
    }
    assert (
        sorted(site.rpartition(".")[2] for site in routers)
        == ["mlp"] * 2 + ["q_proj"] * 2 + ["v_proj"] * 2
    )

    def top_2(site: str, x: Tensor) -> Tensor:
        weights = torch.zeros(len(x), 3).double()
        for t, row in enumerate(x @ routers[site].T):
            best = sorted(range(3), key=lambda e: -row[e])[:2]
            weights[t, best] = row[best].softmax(0)
        return weights

    expected = by_formula(base(), networks, top_2, batch)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits_of(loaded.eval(), batch), logits_of(model, batch))


def test_extracted_networks_equal_the_fine_tuned_ones(base, batch, logits_of, tmp_path):
    """FlexMoRE at full rank: the mixture of two fine-tunes' own networks."""
    tuned, folders = [], []
    for seed in range(2):
        model = fine_tuned(base(), seed)
        folders.append(str(tmp_path / str(seed)))
        molora.extract_lora(base(), model, folders[-1], 32, dtype=torch.float64)
        tuned.append(model)
    mixture = molora.compose(base(), folders, "static", mixing="feed_forward", weights=[0.25, 0.75])
    expected = base()
    for i, layer in enumerate(expected.model.layers):
        pair = [model.model.layers[i].mlp for model in tuned]

        def mixed(module: Any, args: tuple, output: Tensor, pair: list = pair) -> Tensor:
            return 0.25 * pair[0](args[0]) + 0.75 * pair[1](args[0])

        layer.mlp.register_forward_hook(mixed)
    torch.testing.assert_close(logits_of(mixture, batch), logits_of(expected, batch))


def test_low_rank_experts_become_a_native_mixture(tiny_model, tiny_batch, tmp_path, logits_of):
    """From full fine-tunes to a Mixtral: extracted at unlike ranks, composed, exported."""
    folders = []
    for seed, rank in enumerate((4, 8, 16)):
        model = fine_tuned(tiny_model("llama"), seed)
        folders.append(str(tmp_path / str(seed)))
        molora.extract_lora(tiny_model("llama"), model, folders[-1], rank)
    mixture = molora.compose(tiny_model("llama"), folders, "linear", mixing="feed_forward")
    molora.export_moe(mixture, tmp_path / "moe")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert type(native).__name__ == "MixtralForCausalLM"
    batch = {key: tiny_batch("llama")[key] for key in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    ours, theirs = logits_of(mixture, batch)[real], logits_of(native, batch)[real]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - logits_of(tiny_model("llama"), batch)[real]).abs().max() > 1e-2


WHOLE = [name for name in COMPOSERS.names() if not COMPOSERS.get(name).by_module]


@pytest.mark.parametrize("name", WHOLE)
def test_every_way_that_may_decide_for_networks_runs(base, networks, batch, name):
    options = {"centroids": torch.eye(3, 32).double() + 0.1} if name == "ttmm" else {}
    model = molora.compose(base(), networks, name, mixing="feed_forward", **options)
    labels = {"prompt_mask": batch["attention_mask"] * 1}
    with torch.no_grad():
        logits = model(**batch, **labels).logits
        plain = base()(**batch).logits
    real = batch["attention_mask"].bool()
    assert logits.isfinite().all() and (logits - plain)[real].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("arrow", {}, "router='arrow' knows something of each linear module"),
        ("dume", {}, "use linear, lora-mixer, mole, static, ttmm, x-lora"),
        ("static", {"weights": [0.5, 0.2, 0.2]}, "the weights sum to 0.9"),
        ("x-lora", {"top_k": 2}, "sum to less than 1 with top_k"),
    ],
)
def test_what_would_mean_something_else_is_refused(base, networks, router, options, message):
    with pytest.raises(ValueError, match=message):
        molora.compose(base(), networks, router, mixing="feed_forward", **options)


def test_the_plan_says_what_is_mixed(base, networks):
    plan = plan_composition(base(), networks, "static", mixing="feed_forward")
    assert "mixing feed_forward" in plan.describe()
    with pytest.raises(ValueError, match=r"unknown mixing 'network'"):
        plan_composition(base(), networks, "static", mixing="network")
