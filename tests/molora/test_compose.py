"""Saved LoRA adapters as experts: compared with PEFT's own layers and the routers' formulas."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import ArrowConfig, LoraConfig, PeftModel, VeraConfig, create_arrow_model, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import molora
from molora.compose import plan_composition
from molora.layer import MoloraLayer
from molora.routers import top_right_singular_vector

# Unlike ranks, scalings and targets: the third has no v_proj and, of the first layer, nothing.
SPECS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj", "v_proj"]},
    {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"up_proj": 1},
        "alpha_pattern": {"q_proj": 5},
    },
]
Formula = Callable[[Tensor, list[Tensor], list[bool]], Tensor]


@pytest.fixture(scope="module")
def base(tiny_model) -> Callable[[], Any]:
    return lambda: tiny_model("llama").double()


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory) -> list[str]:
    """The three adapters, saved."""
    root = tmp_path_factory.mktemp("adapters")
    for i, spec in enumerate(SPECS):
        torch.manual_seed(i)
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **spec)
        model = get_peft_model(base(), config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.5 * torch.randn_like(parameter)
        model.save_pretrained(root / str(i))
    return [str(root / str(i)) for i in range(3)]


@pytest.fixture(scope="module")
def batch(tiny_batch) -> dict[str, Tensor]:
    return {key: tiny_batch("llama")[key] for key in ("input_ids", "attention_mask")}


def deltas(folder: str) -> dict[str, Tensor]:
    """Site -> s B A of a saved adapter, from PEFT's own layers' merged weights."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    state, found = load_file(Path(folder) / "adapter_model.safetensors"), {}
    for key, A in state.items():
        if key.endswith("lora_A.weight"):
            site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            last = site.rpartition(".")[2]
            alpha = config["alpha_pattern"].get(last, config["lora_alpha"])
            scale = alpha / (len(A) ** 0.5 if config["use_rslora"] else len(A))
            found[site] = scale * state[key.replace("lora_A", "lora_B")] @ A
    return found


def by_formula(model: Any, folders: list[str], formula: Formula, batch: dict) -> Tensor:
    """Logits of the base model with the experts' dense deltas, weighted by `formula` at each site.

    `formula(x (T, d_in), deltas, present)` gives the routing weights (T, E).
    """
    experts = [deltas(folder) for folder in folders]
    for site in {site for expert in experts for site in expert}:
        module = model.get_submodule(site)
        zero = torch.zeros_like(module.weight)
        dense = [expert.get(site, zero) for expert in experts]
        present = [site in expert for expert in experts]

        def add(module, args, output, dense=dense, present=present):
            x = args[0].flatten(0, 1)
            weights = formula(x, dense, present)
            parts = [weights[:, e, None] * (x @ d.mT) for e, d in enumerate(dense)]
            return output + sum(parts).view_as(output)

        module.register_forward_hook(add)
    with torch.no_grad():
        return model(**batch).logits


def top_2(scores: Tensor, present: list[bool]) -> Tensor:
    """Softmax over the two largest scores of those present, token by token."""
    weights = torch.zeros_like(scores)
    here = [e for e, yes in enumerate(present) if yes]
    for t, row in enumerate(scores):
        best = sorted(here, key=lambda e: -row[e])[:2]
        weights[t, best] = row[best].softmax(0)
    return weights


def test_one_adapter_is_pefts_own(base, folders, batch, logits_of):
    for folder in folders:
        theirs = logits_of(PeftModel.from_pretrained(base(), folder), batch)
        assert (theirs - logits_of(base(), batch)).abs().max() > 0.1
        for router in ("static", "arrow"):
            ours = logits_of(molora.compose(base(), [folder], router), batch)
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("weights", [None, [0.7, -0.2, 1.5]], ids=str)
def test_static_is_the_weighted_sum_and_merges(base, folders, batch, logits_of, weights):
    numbers = weights or [1 / 3] * 3

    def formula(x, dense, present):
        return torch.tensor(numbers, dtype=x.dtype).expand(len(x), 3)

    expected = by_formula(base(), folders, formula, batch)
    model = molora.compose(base(), folders, "static", weights=weights)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-12, rtol=1e-12)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-12, rtol=1e-12)


def test_arrow_is_its_formula(base, folders, batch, logits_of):
    def formula(x, dense, present):
        tops = torch.stack([torch.linalg.svd(d).Vh[0] for d in dense])
        return top_2((x @ tops.mT).abs() / 0.4, present)

    expected = by_formula(base(), folders, formula, batch)
    model = molora.compose(base(), folders, top_k=2, temperature=0.4)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-10, rtol=1e-10)


def test_phatgoose_is_its_formula(base, folders, batch, logits_of):
    generator = torch.Generator().manual_seed(5)
    gates = [
        {site: torch.randn(d.shape[1], generator=generator).double() for site, d in found.items()}
        for found in map(deltas, folders)
    ]
    by_delta = {
        float(d.sum()): gates[e][site]
        for e, folder in enumerate(folders)
        for site, d in deltas(folder).items()
    }

    def formula(x, dense, present):
        zero = torch.zeros(x.shape[1], dtype=x.dtype)
        v = torch.stack([by_delta.get(float(d.sum()), zero) for d in dense])
        size = (x.shape[1],)
        return top_2(F.layer_norm(x, size) @ F.layer_norm(v, size).mT / size[0] ** 0.5, present)

    expected = by_formula(base(), folders, formula, batch)
    model = molora.compose(base(), folders, "phatgoose", gates=gates)
    torch.testing.assert_close(logits_of(model, batch), expected, atol=1e-10, rtol=1e-10)


def test_arrow_equals_pefts(tiny_model, batch, logits_of, tmp_path):
    """With rank 1, where PEFT's fifteen power iterations are as exact as the singular vector."""
    paths = []
    for i in range(4):
        torch.manual_seed(i)
        config = LoraConfig(
            r=1, lora_alpha=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / str(i))
        paths.append(str(tmp_path / str(i)))
    arrow = ArrowConfig(top_k=3, router_temperature=0.5)
    theirs = logits_of(create_arrow_model(tiny_model("llama"), paths, arrow).eval(), batch)
    ours = logits_of(molora.compose(tiny_model("llama"), paths, temperature=0.5), batch)
    assert (theirs - logits_of(tiny_model("llama"), batch)).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def arrow(base, folders) -> Any:
    return molora.compose(base(), folders, top_k=2)


def test_an_adapter_is_never_chosen_where_it_is_not(arrow, batch, folders):
    with molora.observe(arrow) as records:
        arrow(**batch)
    assert len(records) == 6
    for site, routing in records.items():
        for e, folder in enumerate(folders):
            if site not in deltas(folder):
                assert (routing.weights[:, e] == 0).all(), site
    first = records["model.layers.0.mlp.up_proj"]  # one adapter alone adapts it
    assert (first.weights[:, 0] == 1).all() and first.logits.isfinite().all()


def test_it_saves_loads_and_stays_frozen(arrow, base, batch, logits_of, tmp_path):
    arrow.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits_of(loaded, batch), logits_of(arrow, batch))
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert not any(parameter.requires_grad for parameter in trainable.parameters())


def test_a_linear_router_trains_and_the_experts_do_not(base, folders, batch, tmp_path):
    model = molora.compose(base(), folders, "linear")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all("molora_router" in name for name in trained)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained


@torch.no_grad()
def test_padding_and_a_cache_change_nothing(arrow, batch):
    whole = arrow(**batch).logits
    ids = batch["input_ids"][1:, :5]
    torch.testing.assert_close(arrow(ids).logits, whole[1:, :5], atol=1e-10, rtol=1e-10)
    start = arrow(ids[:, :3], use_cache=True)
    rest = arrow(ids[:, 3:], past_key_values=start.past_key_values)
    torch.testing.assert_close(rest.logits, whole[1:, 3:5], atol=1e-10, rtol=1e-10)


def test_the_config_names_what_it_can_in_short(base, folders):
    plan = plan_composition(base(), folders)
    assert plan.config.target_modules == {"q_proj", "up_proj", "v_proj"}
    assert plan.config.r["v_proj"] == [2, 4, 1]
    assert plan.ranks["model.layers.1.mlp.up_proj"] == [2, 1, 1]
    same = plan_composition(base(), [folders[0]] * 2)
    assert same.config.r == {".*": [2, 2]} and same.config.top_k == 2
    assert "expert 2: " in plan.describe() and "2 of 6 sites, ranks 1, 3" in plan.describe()
    assert not any(isinstance(m, MoloraLayer) for m in base().modules())


def test_some_modules_of_a_name_are_named_in_full(base, folders):
    plan = plan_composition(base(), [folders[2]])
    layer = "model.layers.1"
    assert plan.config.target_modules == {f"{layer}.self_attn.q_proj", f"{layer}.mlp.up_proj"}


@pytest.mark.parametrize("shape", [(3, 10, 7), (12, 10, 7), (1, 1, 4), (2, 5, 5)])
def test_the_singular_vector_is_that_of_the_product(shape):
    rank, d_in, d_out = shape
    A, B = torch.randn(rank, d_in).double(), torch.randn(d_out, rank).double()
    v, expected = top_right_singular_vector(A, B), torch.linalg.svd(B @ A).Vh[0]
    torch.testing.assert_close((v @ expected).abs(), torch.ones(()).double())
    torch.testing.assert_close(v.norm(), torch.ones(()).double())
    assert (top_right_singular_vector(A, 0 * B) == 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changed its base"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.lora_embedding_A"),
    ],
)
def test_adapters_that_are_more_than_factors(tiny_model, tmp_path: Path, fields, message):
    config = LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    )
    get_peft_model(tiny_model("llama"), config).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        molora.compose(tiny_model("llama"), [str(tmp_path)])


def test_an_adapter_of_another_kind(tiny_model, tmp_path: Path):
    config = VeraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type PeftType.VERA; only LoRA adapters"):
        molora.compose(tiny_model("llama"), [str(tmp_path)])


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({"num_hidden_layers": 1}, "has no such module"),
        ({"intermediate_size": 40}, "has 32 and 40"),
    ],
)
def test_another_base_model(tiny_model, folders, fields, has):
    model = tiny_model("llama", **fields)
    with pytest.raises(ValueError, match=f"trained on another base model: .* this model {has}"):
        molora.compose(model, folders)
    assert not any(isinstance(module, MoloraLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"router": "arow"},
            "unknown router to compose by 'arow'; known: arrow, dume, linear, phatgoose",
        ),
        ({"router": "static", "top_k": 2}, "router='static' chooses nothing"),
        ({"weights": [1, 2, 3]}, "weights are for router='static'"),
        ({"router": "static", "weights": [1.0]}, "weights has 1 entries for 3 adapters"),
        ({"router": "phatgoose"}, "router='phatgoose' needs gates"),
        ({"gates": [{}, {}, {}]}, "router='arrow' has no use for gates"),
        ({"router": "phatgoose", "gates": [{}, {}, {}]}, "gates[0] has no vector for"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"top_k": 1}, "top_k=2 with a small temperature"),
        ({"router": "static", "weights": [0, 0, 0]}, "are all 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_that_do_not_go_together(base, folders, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        molora.compose(base(), folders, **options)


def test_nothing_to_compose(base):
    with pytest.raises(ValueError, match="adapters is empty"):
        molora.compose(base(), [])
