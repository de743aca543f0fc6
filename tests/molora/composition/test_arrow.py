"""Directions that the adapters amplify."""

import torch
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model

import molora

from .dense_mixture import by_formula, top_2


def test_arrow_is_its_formula(base, folders, batch, logits_of):
    def formula(x, site, dense, present):
        tops = torch.stack([torch.linalg.svd(d).Vh[0] for d in dense])
        return top_2((x @ tops.mT).abs() / 0.4, present)

    expected = by_formula(base(), folders, formula, batch)
    model = molora.compose(base(), folders, top_k=2, temperature=0.4)
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
