"""What RoutingCallback logs, against the same numbers computed by hand from a twin model."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer import DEFAULT_CALLBACKS

import molora
from molora.callback import TrainerHook
from molora.context import RoutingContext
from molora.observe import routing_contexts
from molora.stats import RoutingStatistics

from .routed_twin import (
    NUM_EXPERTS,
    Probe,
    Twin,
    checkpoint,
    ragged_batch,
    routed_llama,
    tiny_llama,
)
from .trainer_runs import (
    AT_REST,
    BOTH,
    distillation_trainer,
    grpo_trainer,
    runs,
    sft_trainer,
    trainer,
)

SITE = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def by_hand(twin: Twin, calls: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of a window, from every real token of every call in it."""
    decisions: dict[str, list[tuple[Tensor, Tensor]]] = {}
    losses: dict[str, list[float]] = {"load_balancing": [], "z_loss": []}
    for call in calls:
        for name, terms in twin.losses(call).items():
            losses[name] += [float(term) for term in terms]
        real = call["attention_mask"].flatten().bool()
        for name, (_, probs, weights) in twin.decisions.items():
            decisions.setdefault(name, []).append((probs[real], weights[real]))
    entropies, shares = [], []
    for records in decisions.values():
        probs = torch.cat([p for p, _ in records])
        used = torch.cat([w for _, w in records]) > 0
        entropies.append(float(-(probs * probs.log()).sum(-1).mean()) / math.log(NUM_EXPERTS))
        shares.append(used.sum(0) / used.sum())
    return {
        "routing/entropy": sum(entropies) / len(entropies),
        "routing/largest_share": max(float(share.max()) for share in shares),
        "routing/dead_experts": float(sum(int((share == 0).sum()) for share in shares)),
        "routing/active_experts": 2.0,
        "routing/load_balancing": sum(losses["load_balancing"]) / len(losses["load_balancing"]),
        "routing/z_loss": sum(losses["z_loss"]) / len(losses["z_loss"]),
    }


def logged(run: Trainer) -> list[dict[str, float]]:
    """The entries of the trainer's own loss."""
    return [entry for entry in run.state.log_history if "loss" in entry]


def check_history(build, folder: Path, **options: Any) -> Trainer:
    """Two windows of two steps of two micro-batches each, against the twin."""
    model, probe = routed_llama(BOTH), Probe()
    probe.listen(runs(build, model))
    callback = molora.RoutingCallback(per_site=False, report=False)
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 2, **options}
    run = build(folder, model, [probe, callback], **AT_REST, **options)
    run.train()
    twin, entries = Twin(routed_llama()), logged(run)
    assert len(entries) == 2 and len(probe.windows) == 4
    for entry, first in zip(entries, (0, 2), strict=True):
        expected = by_hand(twin, probe.windows[first] + probe.windows[first + 1])
        found = {name: value for name, value in entry.items() if name.startswith("routing/")}
        assert found == pytest.approx(expected, rel=1e-5)
    return run


@pytest.mark.parametrize("build", [trainer, sft_trainer, grpo_trainer, distillation_trainer])
def test_the_numbers_of_each_window(build, tmp_path: Path):
    check_history(build, tmp_path)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputation_is_not_counted(tmp_path: Path, reentrant: bool):
    kwargs = {"use_reentrant": reentrant}
    check_history(
        trainer, tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs
    )


def test_evaluation_is_not_counted(tmp_path: Path):
    run = check_history(trainer, tmp_path, evaluate=3, eval_strategy="steps", eval_steps=1)
    assert sum("eval_loss" in entry for entry in run.state.log_history) == 4
    assert not any("routing/entropy" in e for e in run.state.log_history if "eval_loss" in e)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_reference_pass_is_not_counted(reentrant: bool | None):
    model, batch = routed_llama(BOTH), ragged_batch()
    if reentrant is not None:
        checkpoint(model, reentrant)
    (context,) = routing_contexts(model)
    context.statistics = RoutingStatistics()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reentrant checkpoint, that it gets no gradient
        model(**batch)  # in training mode, as the reference passes of TRL
    assert context.statistics.sites() == []
    model(**batch).loss.backward()
    assert len(context.statistics.sites()) == 14


def test_each_site_is_logged_by_name(tmp_path: Path):
    model = routed_llama(BOTH, router_options={"bias": True})
    router = model.get_submodule(f"base_model.model.{SITE}.molora_router.default")
    router.bias.data[:2] = 50.0  # every token takes the first two experts there
    callback = molora.RoutingCallback(report=False)
    run = trainer(tmp_path, model, [callback], max_steps=1, **AT_REST)
    run.train()
    (entry,) = logged(run)
    assert entry[f"routing/dead_experts/{SITE}"] == 2.0
    assert entry[f"routing/largest_share/{SITE}"] == 0.5
    assert callback.summary[SITE].share.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert callback.summary[SITE].dead_experts == [2, 3]
    for metric in ("entropy", "largest_share", "dead_experts"):
        assert sum(name.startswith(f"routing/{metric}/model.") for name in entry) == 14


class Tracker(TrainerCallback):
    """As TensorBoard's or W&B's callback: it sees what the log holds when its turn comes."""

    seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_experiment_trackers_get_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(Tracker, "seen", [])
    callback = molora.RoutingCallback(report=False)
    options = {"max_steps": 1, "report_to": ["tensorboard"]}
    run = trainer(tmp_path, routed_llama(BOTH), [callback], **AT_REST, **options)
    run.train()
    (entry,) = logged(run)
    found = [logs for logs in Tracker.seen if "loss" in logs]
    assert len(found) == 1
    assert {"routing/entropy", "routing/z_loss"} <= found[0].keys() <= entry.keys()


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = routed_llama(BOTH, target_modules=["q_proj"])
    trainer(tmp_path, model, [molora.RoutingCallback()], max_steps=1, **AT_REST).train()
    table = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert table[0].split() == ["site", "entropy", "largest", "active", "dead"]
    sites = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert [line.split()[0] for line in table[1:]] == sites
    assert all(line.split()[3] == "2.00" for line in table[1:])


def test_a_model_without_experts_is_refused(tmp_path: Path):
    run = trainer(tmp_path, tiny_llama().train(), [molora.RoutingCallback()], max_steps=1)
    with pytest.raises(ValueError, match="RoutingCallback found no MoLoRA layer"):
        run.train()


def test_nothing_listens_after_training(tmp_path: Path):
    model = routed_llama(BOTH)
    callback = molora.RoutingCallback(report=False)
    trainer(
        tmp_path, model, [callback], max_steps=1, gradient_accumulation_steps=2, **AT_REST
    ).train()
    (context,) = routing_contexts(model)
    assert context.statistics is None
    assert context.loss_scale(torch.tensor(3.0)) == 3.0


class Die(TrainerCallback):
    """Ends the run by an exception after a step."""

    def on_step_end(self, *args, **kwargs):
        raise InterruptedError


def test_a_run_that_dies_leaves_no_accumulation_to_the_loop_after_it(tmp_path: Path):
    model = routed_llama(BOTH)
    run = trainer(tmp_path, model, [Die()], max_steps=2, gradient_accumulation_steps=2)
    with pytest.raises(InterruptedError):
        run.train()
    (context,) = routing_contexts(model)
    assert context.loss_scale(torch.tensor(3.0)) == 3.0


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch):
    """Tensors on "meta" have shapes and no values: whoever looks at one gets an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # knows no "meta"
    model = routed_llama(BOTH).to("meta")
    model.get_base_model().set_attn_implementation("eager")  # SDPA's mask does look
    (context,) = routing_contexts(model)
    context.statistics = RoutingStatistics()
    batch = {name: value.to("meta") for name, value in ragged_batch().items()}
    model(**batch).loss.backward()
    assert len(context.statistics.sites()) == 14
    with pytest.raises(RuntimeError, match="item"):
        context.raise_if_not_finite()  # which the trainer hook does between steps


class Diverge(TrainerCallback):
    """Ruins one router after the first optimizer step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.get_submodule(f"base_model.model.{SITE}.molora_router.default").weight.data.fill_(
            torch.nan
        )


class Elsewhere(Tensor):
    """Host memory that says it is an accelerator's."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]

    def to(self, device: torch.device) -> Tensor:
        return self


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_training_stops_at_logits_that_are_not_finite(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if device == "cuda":
        check = RoutingContext.check_finite
        monkeypatch.setattr(
            RoutingContext,
            "check_finite",
            lambda self, site, logits: check(self, site, logits.as_subclass(Elsewhere)),
        )
    probe, model = Probe(), routed_llama(BOTH)
    probe.listen(model.get_base_model())
    run = trainer(tmp_path, model, [Diverge(), probe], max_steps=4, **AT_REST)
    with pytest.raises(FloatingPointError, match=f"router logits of the site '{SITE}' are not"):
        run.train()
    # at once on the CPU, else at the end of the step
    assert len(probe.windows) == {"cpu": 1, "cuda": 2}[device]


def test_logits_that_are_not_finite_pass_in_evaluation():
    model, batch = routed_llama(BOTH).eval(), ragged_batch()
    model.get_submodule(f"base_model.model.{SITE}.molora_router.default").weight.data.fill_(
        torch.nan
    )
    assert model(**batch).logits.shape == (3, 7, 48)


def test_a_plain_model_trains_as_without_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def train() -> dict[str, Tensor]:
        model = tiny_llama().train()
        run = trainer(tmp_path, model, [], max_steps=2, gradient_accumulation_steps=2)
        run.train()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    assert TrainerHook in DEFAULT_CALLBACKS
    with_hook = train()
    monkeypatch.setattr(
        "transformers.trainer.DEFAULT_CALLBACKS",
        [kind for kind in DEFAULT_CALLBACKS if kind is not TrainerHook],
    )
    for name, parameter in train().items():
        assert torch.equal(parameter, with_hook[name]), name
