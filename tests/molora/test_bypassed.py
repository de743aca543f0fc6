"""Targets that a model reads past: refused before anything changes; what remains works."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

import molora
from molora.bypassed import READ_BY_MODEL
from molora.layer import MoloraLayer


def config(**fields) -> molora.MoloraConfig:
    return molora.MoloraConfig(**{"r": 2, "num_experts": 3, "init_lora_weights": False, **fields})


def mamba() -> nn.Module:
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**shape))


def wavlm() -> nn.Module:
    return transformers.WavLMModel(
        transformers.WavLMConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8,),
            conv_stride=(4,),
            conv_kernel=(4,),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=1,
        )
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize(
    ("build", "targets", "said"),
    [
        (mamba, "all-linear", r"'mamba' model reads the weight of its x_proj, dt_proj, out_proj"),
        (mamba, ["in_proj", "dt_proj"], r"dt_proj' can't have experts"),
        (wavlm, ["q_proj"], r"'wavlm' model reads the weight of its q_proj, k_proj"),
        (encoder, ["out_proj"], r"MultiheadAttention reads the weight of its out_proj"),
        (
            encoder,
            ["linear1"],
            r"'layers\.0\.linear1' .*eval mode; .*fastpath_enabled\(False\)",
        ),
    ],
    ids=["mamba", "one of mamba", "wavlm", "attention", "encoder layer"],
)
def test_it_is_refused_and_the_model_stays_as_it_was(build, targets, said):
    model = build()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, config(target_modules=targets))
    assert [type(module) for module in model.modules()] == before


def test_what_is_left_of_mamba_trains():
    fields = {"target_modules": "all-linear", "exclude_modules": list(READ_BY_MODEL["mamba"])}
    model = get_peft_model(mamba(), config(**fields)).train()
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


def test_without_its_fast_path_an_encoder_layer_runs_its_experts():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        base, x = encoder().eval(), torch.randn(2, 5, 16)
        with torch.no_grad():
            plain = base(x)
            model = get_peft_model(base, config(target_modules=["linear1", "linear2"]))
            assert len([m for m in model.modules() if isinstance(m, MoloraLayer)]) == 4
            in_eval, in_training = model.eval()(x), model.train()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(in_eval, in_training)
    assert not torch.allclose(in_eval, plain, atol=1e-3)
