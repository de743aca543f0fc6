"""`molora.calibrate` on a language model: what is held, measured, restored and refused."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import molora
from molora import CalibrationReport, MoloraConfig
from molora.calibration import collect_moments, fit_each
from molora.layer import adapted_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def model(tiny_model, randomize):
    config = MoloraConfig(num_experts=3, r=2, num_shared_experts=1, target_modules=TARGETS)
    return randomize(get_peft_model(tiny_model("llama"), config)).eval()


def make_batches(count: int, pad: int = 0) -> list[dict[str, Tensor]]:
    """Batches of two rows; with `pad`, the same tokens beside that much padding of noise."""
    batches = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 64, (2, 9), generator=generator)
        noise = torch.randint(3, 64, (2, pad), generator=generator)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(noise)], 1)
        batches.append({"input_ids": torch.cat([ids, noise], 1), "attention_mask": mask})
    return batches


def run(model: Any, method: str = "least_squares", **options: Any) -> CalibrationReport:
    batches = options.pop("batches", make_batches(4))
    return molora.calibrate(model, batches, method, progress=False, **options)


@pytest.mark.parametrize("method", ["mean", "least_squares", "full", "low_rank"])
def test_the_merged_model_computes_what_was_measured(model, method, logits_of):
    held_out = make_batches(6)[4:]
    routed = [logits_of(model, batch).double() for batch in held_out]
    with model.disable_adapter():
        base = [logits_of(model, batch).double() for batch in held_out]
    rank = 2 if method == "low_rank" else None
    report = run(model, method, rank=rank, held_out=held_out)
    assert all(
        torch.equal(logits_of(model, batch).double(), logits)
        for batch, logits in zip(held_out, routed, strict=True)
    )
    with molora.static_routing(model):
        static = [logits_of(model, batch) for batch in held_out]
    with pytest.warns(
        UserWarning, match=f"an approximation of the routing: calibrated by {method}"
    ):
        model.merge_adapter()
    for batch, logits in zip(held_out, static, strict=True):
        torch.testing.assert_close(logits_of(model, batch), logits, rtol=1e-4, atol=1e-4)
    p = torch.cat(routed).flatten(0, 1).log_softmax(-1)
    for logits, kl, agreement in (
        (static, report.held_out.kl, report.held_out.top1_agreement),
        (base, report.held_out.base_kl, report.held_out.base_top1_agreement),
    ):
        q = torch.cat(logits).double().flatten(0, 1).log_softmax(-1)
        expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
        assert kl == pytest.approx(float(expected), rel=1e-4)
        assert agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert report.held_out.tokens == 2 * 2 * 9
    assert 0 < report.held_out.kl < report.held_out.base_kl
    assert {site.rank for site in report.sites} == {2 if rank else 8}
    model.unmerge_adapter()
    assert torch.equal(logits_of(model, held_out[0]).double(), routed[0])


@pytest.mark.parametrize("method", ["least_squares", "full"])
def test_padding_is_not_counted(model, method):
    bare = run(model, method, batches=make_batches(3))
    padded = run(model, method, batches=make_batches(3, pad=4))
    assert padded.tokens == bare.tokens == 2 * 2 * 9
    assert padded.held_out.tokens == bare.held_out.tokens == 2 * 9
    assert padded.relative_error == pytest.approx(bare.relative_error, rel=1e-3)
    assert padded.held_out.kl == pytest.approx(bare.held_out.kl, rel=1e-3)


def test_every_eighth_batch_is_held_out_and_a_single_one_is_fitted(model):
    report = run(model, "mean", batches=iter(make_batches(11)))
    assert report.tokens == 9 * 18 and report.held_out.tokens == 2 * 18
    alone = run(model, "mean", batches=make_batches(1))
    assert alone.tokens == 18 and alone.held_out is None
    assert alone.summary().endswith("not compared on held-out data")


def test_the_report_is_a_table_and_json(model, tmp_path):
    report = run(model)
    lines = str(report).splitlines()
    assert lines[0].split() == ["site", "rank", "error", "routing", "weights"]
    assert len(lines) == 1 + len(report.sites) + 1 and lines[-1] == report.summary()
    name, rank, error, *weights = lines[1].split()
    assert (name, rank) == ("model.layers.0.self_attn.q_proj", "8")
    assert float(error) == pytest.approx(report.sites[0].relative_error, abs=1e-4)
    assert len(weights) == 3
    report.save(tmp_path / "report.json")
    assert CalibrationReport.load(tmp_path / "report.json") == report
    full = run(model, "full", held_out=[])
    full.save(tmp_path / "full.json")
    assert CalibrationReport.load(tmp_path / "full.json") == full


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.base_model.model.model.layers[1].eval()
    model.base_model.model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    run(model, "full")
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for layer in adapted_layers(model).values():
        assert not layer._forward_hooks and layer.routing_context.records is None


def test_experts_that_were_trained_on_are_not_merged_by_an_old_calibration(model):
    run(model)
    layer = adapted_layers(model)["model.layers.1.mlp.down_proj"]
    layer.molora_experts["default"].A.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"changed since .* calibrated by .*molora\.calibrate or"):
        layer.get_delta_weight("default")


def test_several_methods_share_the_passes_without_a_stand_in(model):
    batches, held_out = make_batches(3), make_batches(5)[3:]
    moments = collect_moments(model, batches, linear_maps=True, progress=False)
    methods = {"full": None, "low_rank": 2, "mean": None}
    passes = []
    hook = model.register_forward_pre_hook(lambda *args: passes.append(1))
    reports = fit_each(model, moments, methods, held_out=held_out, progress=False)
    hook.remove()
    assert len(passes) == len(held_out) * (2 + len(methods))
    for (method, rank), report in zip(methods.items(), reports, strict=True):
        assert report == run(model, method, rank=rank, batches=batches, held_out=held_out)
    assert len({report.held_out.kl for report in reports}) == 3
    held = adapted_layers(model)["model.layers.0.mlp.down_proj"].molora_static["default"]
    assert held.source == reports[-1].summary()


def test_a_failed_comparison_leaves_what_was_held_before(model):
    run(model, "mean")
    layer = adapted_layers(model)["model.layers.0.mlp.down_proj"]
    before = layer.molora_static["default"]
    with pytest.raises(TypeError):
        run(model, "full", held_out=[{"input_ids": 3}])
    assert layer.molora_static["default"] is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "median"}, "unknown method 'median'; known: full, least_squares"),
        ({"method": "low_rank"}, "rank=None with method='low_rank'"),
        ({"method": "mean", "rank": 4}, "rank=4 with method='mean'"),
        ({"method": "low_rank", "rank": 0}, "rank=0 must be a whole number of at"),
        ({"method": "low_rank", "rank": 1.5}, "rank=1.5 must be a whole number of at least 1"),
        ({"ridge": -1.0}, "ridge=-1.0 must be a number, and not negative"),
        ({"ridge": float("inf")}, "ridge=inf must be a number, and not negative"),
        ({"ridge": "0.1"}, "ridge='0.1' must be a number, and not negative"),
        ({"adapter_name": "other"}, "no MoLoRA adapter named 'other'"),
        ({"batches": []}, "no real token"),
        ({"batches": [{**make_batches(1)[0], "attention_mask": torch.zeros(2, 9).long()}]},
         "no real token"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, **options)


def test_nothing_to_calibrate_and_other_adapters_at_work(model, tiny_model):
    model.add_adapter("second", MoloraConfig(target_modules=TARGETS))
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"the adapters \['second'\] are active, and 'default'"):
        run(model)
    constant = MoloraConfig(gate="uniform", router="random", target_modules=TARGETS)
    plain = MoloraConfig(num_experts=0, num_shared_experts=1, r=4, target_modules=TARGETS)
    for config in (constant, plain):
        other = get_peft_model(tiny_model("llama"), config)
        with pytest.raises(ValueError, match="routes nothing by token; it merges exactly as it is"):
            run(other)


def test_an_unrouted_adapter_can_be_cut_to_a_lower_rank(tiny_model, randomize):
    config = MoloraConfig(num_experts=0, num_shared_experts=1, r=4, target_modules=TARGETS)
    model = randomize(get_peft_model(tiny_model("llama"), config)).eval()
    report = run(model, "low_rank", rank=3)
    assert {site.rank for site in report.sites} == {3}
    assert 0 < report.relative_error < 0.7
    exact = run(model, "low_rank", rank=4)
    assert exact.relative_error < 1e-2 and exact.held_out.kl < 1e-4


def test_several_processes_would_each_fit_their_own_share(model, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes calibrate"):
        run(model)
