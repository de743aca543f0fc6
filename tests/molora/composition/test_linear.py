"""A router to be trained over frozen adapters."""

from peft import PeftModel

import molora


def test_a_linear_router_trains_and_the_experts_do_not(base, folders, batch, tmp_path):
    model = molora.compose(base(), folders, "linear")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all("molora_router" in name for name in trained)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
