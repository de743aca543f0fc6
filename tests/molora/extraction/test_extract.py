"""LoRA from full fine-tunes: against PEFT loading it, and numpy's singular values."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file

import molora
from molora.extraction import plan_extraction

NETWORK = ["gate_proj", "up_proj", "down_proj"]


def fine_tuned(model: Any, *, names: tuple[str, ...] = ("proj",), rank: int | None = None) -> Any:
    """The model with every weight whose name has one of those changed, by a matrix of that rank."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names) and parameter.dim() == 2:
            d_out, d_in = parameter.shape
            inner = rank or min(d_out, d_in)
            B, A = (
                torch.randn(*shape, generator=generator, dtype=parameter.dtype)
                for shape in ((d_out, inner), (inner, d_in))
            )
            parameter.data += 0.03 * B @ A
    return model


@pytest.fixture
def base(tiny_model) -> Callable[[], Any]:
    return lambda: tiny_model("llama").double()


def changes(before: Any, after: Any) -> dict[str, np.ndarray]:
    """Name of a module -> D (d_out, d_in), for all linear ones of a Llama that differ."""
    old = dict(before.named_parameters())
    return {
        name.removesuffix(".weight"): (new - old[name]).detach().numpy()
        for name, new in after.named_parameters()
        if "proj" in name and not torch.equal(new, old[name])
    }


def optimal_errors(D: np.ndarray) -> np.ndarray:
    """The least relative error of a matrix of rank 0, 1, 2, ... (Eckart and Young)."""
    S = np.linalg.svd(D, compute_uv=False)
    return np.sqrt(np.append(np.cumsum(S[::-1] ** 2)[::-1], 0) / np.sum(S**2))


def test_at_the_fine_tunes_own_rank_nothing_is_lost(base, tmp_path, tiny_batch, logits_of):
    tuned = fine_tuned(base(), rank=3)
    report = molora.extract_lora(base(), tuned, tmp_path / "lora", rank=3, dtype=torch.float64)
    assert len(report.errors) == 14 and max(report.errors.values()) < 1e-12
    loaded = PeftModel.from_pretrained(
        base(), str(tmp_path / "lora"), autocast_adapter_dtype=False
    ).eval()
    batch = tiny_batch("llama")
    torch.testing.assert_close(
        logits_of(loaded, batch), logits_of(tuned, batch), rtol=1e-10, atol=1e-10
    )
    assert (logits_of(tuned, batch) - logits_of(base(), batch)).abs().max() > 1e-2


def test_errors_are_the_least_of_that_rank(base, tmp_path):
    tuned = fine_tuned(base())
    rank = {"mlp.*": 5, "q_proj": 2, ".*": 1}
    report = molora.extract_lora(base(), tuned, tmp_path / "lora", rank, dtype=torch.float64)
    for site, D in changes(base(), tuned).items():
        r = 5 if ".mlp." in site else 2 if "q_proj" in site else 1
        assert report.ranks[site] == r
        assert report.errors[site] == pytest.approx(optimal_errors(D)[r], rel=1e-9)
    merged = PeftModel.from_pretrained(
        base(), str(tmp_path / "lora"), autocast_adapter_dtype=False
    ).merge_and_unload()
    for site, D in changes(base(), tuned).items():
        left = merged.get_submodule(site).weight - tuned.get_submodule(site).weight
        error = np.linalg.norm(left.detach().numpy()) / np.linalg.norm(D)
        assert error == pytest.approx(report.errors[site], rel=1e-9)


def test_the_lowest_rank_that_reaches_an_error_is_chosen(base, tmp_path):
    tuned = fine_tuned(base())
    report = molora.extract_lora(base(), tuned, tmp_path / "lora", max_error=0.3)
    for site, D in changes(base(), tuned).items():
        errors = optimal_errors(D)
        r = report.ranks[site]
        assert errors[r] <= 0.3 < errors[r - 1]
    assert len(set(report.ranks.values())) > 1
    assert f"{max(report.errors.values()):.4f}" in report.summary()


def test_an_error_out_of_reach_is_said(base, tmp_path):
    with pytest.warns(UserWarning, match="max_error=0.1 is not reached at 14 modules"):
        molora.extract_lora(base(), fine_tuned(base()), tmp_path / "lora", rank=2, max_error=0.1)


def test_the_reported_error_is_that_of_the_file(base, tmp_path):
    tuned = fine_tuned(base(), rank=2)
    report = molora.extract_lora(base(), tuned, tmp_path / "lora", rank=2, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for site, D in changes(base(), tuned).items():
        A, B = (stored[f"base_model.model.{site}.lora_{factor}.weight"] for factor in "AB")
        assert A.dtype == torch.bfloat16
        left = D - (B.double() @ A.double()).numpy()
        error = np.linalg.norm(left) / np.linalg.norm(D)
        assert report.errors[site] == pytest.approx(error, rel=1e-6) and error > 1e-4


@pytest.mark.filterwarnings("ignore:molora. Changed by the fine-tune:UserWarning")
def test_files_give_what_loaded_models_give(base, tmp_path):
    tuned = fine_tuned(base())
    base().save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").exists()
    folders = tmp_path / "base", tmp_path / "tuned"
    read = molora.extract_lora(*folders, tmp_path / "read", 4, targets=NETWORK, allow_loss=True)
    given = molora.extract_lora(
        base(), tuned, tmp_path / "given", 4, targets=NETWORK, allow_loss=True
    )
    assert read.errors == given.errors and read.lost == given.lost
    stored = [
        load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("read", "given")
    ]
    assert stored[0].keys() == stored[1].keys() and len(stored[0]) == 12
    for key, tensor in stored[0].items():
        torch.testing.assert_close(tensor, stored[1][key])
    config = json.loads((tmp_path / "read" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_what_the_adapter_cannot_hold_is_refused_or_said(base, tmp_path):
    tuned = fine_tuned(base(), names=("up_proj", "embed_tokens"), rank=2)
    tuned.model.norm.weight.data *= 1.5
    with pytest.raises(
        ValueError, match="also changed model.embed_tokens.weight.*model.norm.weigh"
    ):
        molora.extract_lora(base(), tuned, tmp_path / "lora", 2, targets=["up_proj"])
    assert not (tmp_path / "lora").exists()
    with pytest.warns(UserWarning, match="but not held"):
        report = molora.extract_lora(
            base(), tuned, tmp_path / "lora", 2, targets=["up_proj", "q_proj"], allow_loss=True
        )
    assert report.lost["model.norm.weight"] == pytest.approx(0.5)
    assert sorted(report.lost) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert len(report.unchanged) == 2 and all("q_proj" in site for site in report.unchanged)
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert "model.norm.weight (0.5)" in card.text and "q_proj" in card.text
    site = "model.layers.0.mlp.up_proj"
    assert f"| {site} | 2 | {report.errors[site]:.4g} |" in card.text


def test_a_conv1d_is_transposed(tiny_model, tmp_path, tiny_batch, logits_of):
    base = tiny_model("gpt2")
    tuned = fine_tuned(tiny_model("gpt2"), names=("c_fc", "c_proj"), rank=2)
    molora.extract_lora(base, tuned, tmp_path / "lora", 2)
    loaded = PeftModel.from_pretrained(tiny_model("gpt2"), str(tmp_path / "lora")).eval()
    batch = tiny_batch("gpt2")
    torch.testing.assert_close(
        logits_of(loaded, batch), logits_of(tuned, batch), rtol=1e-4, atol=1e-4
    )


def test_two_fine_tunes_compose_into_their_mean(base, tmp_path, tiny_batch, logits_of):
    tuned = [fine_tuned(base(), names=(name,), rank=2) for name in ("up_proj", "q_proj")]
    folders = []
    for i, model in enumerate(tuned):
        folders.append(str(tmp_path / str(i)))
        molora.extract_lora(base(), model, folders[-1], 2, dtype=torch.float64)
    mixture = molora.compose(base(), folders, router="static", weights=[0.5, 0.5])
    mean = base()
    for (_, target), *sources in zip(
        mean.named_parameters(), *(model.parameters() for model in tuned), strict=True
    ):
        target.data = torch.stack([source.data for source in sources]).mean(0)
    batch = tiny_batch("llama")
    torch.testing.assert_close(logits_of(mixture, batch), logits_of(mean, batch))


def test_tied_embeddings_count_once(tiny_model, tmp_path):
    base = tiny_model("llama", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    tuned = fine_tuned(tiny_model("llama", tie_word_embeddings=True), rank=1)
    report = molora.extract_lora(tmp_path / "base", tuned, tmp_path / "lora", 1)
    assert max(report.errors.values()) < 1e-4 and not report.lost


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": None}, "give rank, max_error, or both"),
        ({"rank": 0}, "rank=0"),
        ({"rank": [4, 2]}, r"rank=\[4, 2\] must be a number or a regex map"),
        (
            {"rank": {"mlp.*": 4}},
            "rank has no entry for the site 'model.layers.0.self_attn.q_proj'",
        ),
        ({"max_error": 1.5}, "max_error=1.5 must be between 0 and 1"),
        ({"dtype": "bf16"}, "dtype='bf16' must be one of floating point"),
        ({"targets": ["embed_tokens"]}, "'model.embed_tokens', a Embedding; only linear"),
        ({"targets": ["nothing"]}, r"targets=\['nothing'\] name no module"),
        ({"targets": ["q_proj", "vproj"]}, "targets vproj name no module of the base model"),
        ({"rank": {"qproj": 4, ".*": 2}}, "rank has qproj, which match no targeted module"),
        ({"targets": ["down_proj"]}, "also changed model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_wrong_options_are_named(options, message, base, tmp_path):
    chosen = {"rank": 2, **options}
    with pytest.raises(ValueError, match=message):
        molora.extract_lora(base(), fine_tuned(base()), tmp_path / "lora", **chosen)


def test_models_that_do_not_fit_are_named(base, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="equals .* in all targeted modules"):
        molora.extract_lora(base(), base(), tmp_path / "lora", 2)
    with pytest.raises(ValueError, match="aren't of one architecture.*layers.2"):
        molora.extract_lora(base(), tiny_model("llama", num_hidden_layers=3), tmp_path / "lora", 2)
    with pytest.raises(ValueError, match=r"\(64, 32\) in the base model and \(65, 32\)"):
        molora.extract_lora(base(), tiny_model("llama", vocab_size=65), tmp_path / "lora", 2)
    broken = fine_tuned(base())
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="ForCausalLM' holds .* model.layers.1.mlp.up_proj.weight"):
        molora.extract_lora(base(), broken, tmp_path / "lora", 2)
    with pytest.raises(ValueError, match="no safetensors files"):
        molora.extract_lora(base(), tmp_path, tmp_path / "lora", 2)


@pytest.mark.parametrize("shard", ["truncated", "gone"])
def test_broken_files_are_named(base, tmp_path, shard):
    base().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    path = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:100])
    if shard == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing, corrupted or incomplete"):
        molora.extract_lora(tmp_path / "base", base(), tmp_path / "lora", 2)
    assert not (tmp_path / "lora").exists()


def test_the_plan_says_how_large_it_gets(base, tmp_path):
    plan = plan_extraction(base(), 4, targets=NETWORK)
    numbers = 2 * 4 * 3 * (32 + 48)
    assert plan.describe(torch.float32) == (
        f"6 modules, ranks 4 at most, {numbers * 4 / 2**20:,.1f} MiB at most"
    )
    assert math.isclose(len(plan.most), 6)
