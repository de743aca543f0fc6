"""`MoloraConfig`: everything that defines an adapter, flat, checked on construction, JSON both
ways."""

import json
import os
import tempfile
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME

from .checkpoint import check_weights_file
from .config_checks import (
    PerLayer,
    as_names,
    as_targets,
    check_alpha,
    check_choice,
    check_count,
    check_gate_loss,
    check_layers,
    check_loss,
    check_provenance,
    check_rank,
    check_router_learns,
    check_token_rows,
    check_top_k,
    some_count,
)
from .experts import EXPERTS, SiteSpec
from .gates import GATES
from .losses import LOSSES, Loss
from .peft_type import MOLORA
from .registry import unknown_name_message
from .routers import ROUTERS
from .settings import check_regex, check_setting, is_zero
from .value_types import is_number

SCHEMA_VERSION = 1
SCALING_RULES = ("alpha/r", "alpha/sqrt(r)", "constant")
MIXINGS = ("linear", "feed_forward")
ROUTER_SCOPES = ("site", "block", "layer", "model")
INIT_CHOICES = (True, False, "gaussian")
BIAS_CHOICES = ("none", "all", "molora_only")
MAPPINGS = (
    "expert_options",
    "router_options",
    "gate_options",
    "losses",
    "rank_pattern",
    "alpha_pattern",
)
# Stands for the features and the sites of a model that isn't known yet: much divides it.
ANY_SIZE = 2**10 * 3**2 * 5 * 7


@dataclass
class MoloraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts.

    `r`, `num_experts`, `top_k` and `num_shared_experts` may each be a number, a list with one value
    per layer, a named pattern such as "inverted_triangle:2-8/4" or a regex map (see
    `molora.settings`).

    Args:
        r: rank of an expert; where a list stands for one layer or regex (`[[2, 4], [8, 8]]`,
            `{".*": [2, 4, 8, 16]}`), the rank of each expert there.
        lora_alpha: numerator of the scaling.
        lora_dropout: dropout on the experts' input, in training.
        num_experts: routed experts of a site, E. 0 with shared experts is plain LoRA; 1 needs no
            router and equals plain LoRA too.
        top_k: experts of a token, K, for the gates that select a fixed number; None is the gate's
            own (2, or 1 for "switch").
        num_shared_experts: experts that are always on, with weight 1.
        shared_expert_rank: rank of a shared expert; None is the rank of the site's first expert.
        rank_wise: split each expert into as many experts of rank 1 as it has ranks, so that every
            rank is routed by itself. The scaling stays that of the whole expert.
        scaling_rule: "alpha/r", "alpha/sqrt(r)" or "constant" (alpha itself), with each expert's
            own r.
        use_rslora: PEFT's name for scaling_rule="alpha/sqrt(r)".
        experts: parametrisation of the experts; `expert_options` are its own settings.
        router: what the logits are computed from; `router_options` are its own settings.
        router_scope: "site": every module routes for itself. "block": modules that read the same
            input (q, k, v; gate, up) share one decision. "layer": all modules of a layer follow the
            decision of the first. "model": one decision for all modules, by a router that reads
            nothing of them (the task, the instruction).
        mixing: "linear": the experts of each module are mixed there. "feed_forward": one decision
            for each feed-forward network, whose experts run through it to the end, down projection
            included, before their outputs are mixed; the targeted modules inside it make one site,
            named after the network. Modules elsewhere are sites of their own, and a regex map for
            `num_experts` (0) and `num_shared_experts` (1) makes them plain LoRA.
        gate: how logits become routing weights; `gate_options` are its own settings.
        losses: auxiliary losses by name, with a coefficient, or with a mapping of "coefficient" and
            the loss's own settings.
        target_modules: modules that become sites, as for LoRA; "all-linear" for every linear layer
            but the output head.
        exclude_modules: modules that don't, by the same rules.
        layers_to_transform: restrict the sites to these layers.
        layers_pattern: name of the module list that `layers_to_transform` counts in.
        rank_pattern: regex -> rank (or ranks of the experts), overriding `r`.
        alpha_pattern: regex -> alpha, overriding `lora_alpha`.
        bias: "none", "all" or "molora_only": which biases of the base model train.
        modules_to_save: modules that are trained and saved whole.
        trainable_token_indices: rows of the embedding that are trained and saved.
        init_lora_weights: True (the output starts equal to the base model's), "gaussian" (the same,
            with a Gaussian A) or False (B random: for tests).
        method: the published method this config was built from.
        method_version: the version of that method's definition.
        schema_version: version of this configuration's format, written by the library.
    """

    r: PerLayer = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    num_experts: PerLayer = 8
    top_k: PerLayer | None = None
    num_shared_experts: PerLayer = 0
    shared_expert_rank: int | None = None
    rank_wise: bool = False
    scaling_rule: str = "alpha/r"
    use_rslora: bool = False
    experts: str = "lora"
    expert_options: dict[str, Any] = field(default_factory=dict)
    router: str = "linear"
    router_options: dict[str, Any] = field(default_factory=dict)
    router_scope: str = "site"
    mixing: str = "linear"
    gate: str = "top_k"
    gate_options: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool | str = True
    method: str | None = None
    method_version: int | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(1)("schema_version", self.schema_version)
        if self.schema_version > SCHEMA_VERSION:
            raise ValueError(
                f"this adapter was written with schema_version {self.schema_version}, and this "
                f"version of molora reads up to {SCHEMA_VERSION}; upgrade molora to load it."
            )
        self.peft_type = MOLORA
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, as_targets(name, getattr(self, name)))
        self.modules_to_save = as_names("modules_to_save", self.modules_to_save)
        if not isinstance(self.layers_pattern, str):
            self.layers_pattern = as_names("layers_pattern", self.layers_pattern)
        self._check_choices()
        self._check_sizes()
        self._check_gate_and_router()
        self._check_mixing()

    @classmethod
    def from_method(cls, name: str, **overrides: Any) -> "MoloraConfig":
        """The configuration of a published method, with any field overridden.

        Raises:
            ValueError: the method or a field isn't known; the message lists those that are.
        """
        from .methods import METHODS

        method = METHODS.get(name)
        cls.check_fields(overrides)
        provenance = {"method": name, "method_version": method.version}
        return cls(**{**deepcopy(dict(method.defaults)), **provenance, **overrides})

    @classmethod
    def check_fields(cls, names: Iterable[str]) -> None:
        """Raise `ValueError` unless each is the name of a field; it lists those that are."""
        known = cls.__dataclass_fields__
        for name in names:
            if name not in known:
                raise ValueError(unknown_name_message("field", name, known))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Read the configuration from a folder or the Hub, as PEFT does.

        Raises:
            ValueError: the weights beside it are corrupted, or the schema is newer than this one.
        """
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        check_weights_file(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json; an interruption leaves the previous file as it was."""
        if not Path(save_directory).is_file():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=save_directory) as scratch:
                super().save_pretrained(scratch, **kwargs)
                self._restore_order(Path(scratch) / CONFIG_NAME)
                for path in Path(scratch).iterdir():
                    os.replace(path, Path(save_directory) / path.name)
        else:
            super().save_pretrained(save_directory, **kwargs)  # PEFT's own error

    def _restore_order(self, path: Path) -> None:
        """Put back the order of regexes, whose first match counts: PEFT writes sorted keys.

        Sets are written sorted, so that equal configurations give equal files.
        """
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in vars(self).items():
            if isinstance(value, dict) and name in saved and name != "auto_mapping":
                saved[name] = value
            elif isinstance(value, set):
                saved[name] = sorted(value)
        path.write_text(json.dumps(saved, indent=2), encoding="utf-8")

    def build_losses(self) -> dict[str, tuple[float, Loss]]:
        """The configured losses by name, each with its coefficient.

        Raises:
            ValueError: a name, coefficient or setting is wrong.
        """
        built = {}
        for name, value in self.losses.items():
            options = dict(value) if isinstance(value, dict) else {"coefficient": value}
            coefficient = options.pop("coefficient", None)
            if not is_number(coefficient):
                raise ValueError(
                    f"losses[{name!r}]={value!r} needs a number as its coefficient, or a mapping "
                    'such as {"coefficient": 0.01}.'
                )
            loss = LOSSES.build(name, options)
            check_loss(name, loss, self.gate)
            built[name] = (float(coefficient), loss)
        return built

    def _check_choices(self) -> None:
        check_choice("scaling_rule", self.scaling_rule, SCALING_RULES)
        check_choice("router_scope", self.router_scope, ROUTER_SCOPES)
        check_choice("mixing", self.mixing, MIXINGS)
        check_choice("bias", self.bias, BIAS_CHOICES)
        check_choice("init_lora_weights", self.init_lora_weights, INIT_CHOICES)
        for name in ("rank_wise", "use_rslora", "inference_mode"):
            check_choice(name, getattr(self, name), (True, False))
        check_provenance(self.method, self.method_version)
        for name in MAPPINGS:
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a mapping; {{}} is none.")
        if self.use_rslora and self.scaling_rule == "constant":
            raise ValueError(
                "use_rslora=True means scaling_rule='alpha/sqrt(r)', but scaling_rule='constant'."
            )
        if self.use_rslora:
            self.scaling_rule = "alpha/sqrt(r)"
        for pattern_field in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, pattern_field) is not None:
                raise ValueError(
                    f"{pattern_field} can't be used with target_modules={self.target_modules!r}; "
                    "give target_modules as a list, or put the layers into the regex."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform; give both.")

    def _check_sizes(self) -> None:
        check_setting("num_experts", self.num_experts, check_count(0))
        check_setting("num_shared_experts", self.num_shared_experts, check_count(0))
        check_setting("r", self.r, check_rank)
        check_layers(self.layers_to_transform)
        check_token_rows(self.trainable_token_indices)
        if self.top_k is not None:
            check_setting("top_k", self.top_k, check_count(1))
        for pattern, rank in self.rank_pattern.items():
            check_regex("rank_pattern", pattern)
            check_rank(f"rank_pattern[{pattern!r}]", rank)
        if self.shared_expert_rank is not None:
            check_count(1)("shared_expert_rank", self.shared_expert_rank)
            if is_zero("num_shared_experts", self.num_shared_experts):
                raise ValueError(
                    f"shared_expert_rank={self.shared_expert_rank} has no effect with "
                    f"num_shared_experts={self.num_shared_experts!r}; set that too, or leave the "
                    "rank out."
                )
        check_alpha("lora_alpha", self.lora_alpha)
        for pattern, alpha in self.alpha_pattern.items():
            check_regex("alpha_pattern", pattern)
            check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must be in [0, 1).")
        if self.num_experts == 0 and self.num_shared_experts == 0:
            raise ValueError(
                "num_experts=0 and num_shared_experts=0 leave no expert at all; set one of them."
            )

    def _check_gate_and_router(self) -> None:
        # Building an instance checks the options' names and values in one place: the class.
        count = some_count(self.num_experts)
        ranks = (some_count(self.r),) * count
        if self.rank_wise:
            ranks = (1,) * sum(ranks)
        scaling = (1.0,) * len(ranks)
        spec = SiteSpec(ANY_SIZE, ANY_SIZE, ranks, (), scaling, sites=ANY_SIZE)
        with torch.device("meta"):
            EXPERTS.build(self.experts, self.expert_options, spec=spec)
        if self.init_lora_weights == "gaussian" and not EXPERTS.get(self.experts).takes_gaussian:
            raise ValueError(
                f"init_lora_weights='gaussian' has no effect with experts={self.experts!r}, which "
                "start in a way of their own; use True, or False for random values."
            )
        router = ROUTERS.build(self.router, self.router_options, in_features=1, num_experts=2)
        gate = GATES.get(self.gate)
        if self.router_scope == "model" and (router.reads_site or router.noise or gate.draws):
            fault = (
                f"router={self.router!r} reads its own module's input"
                if router.reads_site
                else f"router option noise={router.noise}"
                if router.noise
                else f"gate={self.gate!r}"
            )
            raise ValueError(
                "router_scope='model' decides once for all modules, before the first of them runs, "
                f"but {fault}{'' if router.reads_site else ' draws anew at each'}; use a router "
                "that reads the task or the instruction, and nothing that draws, or another "
                "router_scope."
            )
        self._check_token_mixing()
        learns = any(True for _ in router.parameters())
        trained = any(coefficient for coefficient, _ in self.build_losses().values())
        if learns:
            check_router_learns(self.gate, self.router, trained)
        top_k = self.top_k if isinstance(self.top_k, int) else None
        top_k = top_k or gate.fixed_top_k or gate.default_top_k
        units = count * self.r if self.rank_wise and isinstance(self.r, int) else max(count, 4)
        GATES.build(self.gate, self.gate_options, num_experts=units, top_k=top_k, in_features=1)
        check_gate_loss(self.gate, self.losses)
        if self.top_k is None:
            return
        if not gate.takes_top_k:
            raise ValueError(
                f"top_k={self.top_k!r} has no effect with gate={self.gate!r}, which selects by "
                "itself; use top_k=None."
            )
        # Per-layer forms are checked site by site, where the number of experts is known.
        if isinstance(self.top_k, int):
            experts = self.num_experts if isinstance(self.num_experts, int) else None
            check_top_k(self.gate, self.top_k, None if self.rank_wise else experts)

    def _check_token_mixing(self) -> None:
        gate_mixes = GATES.get(self.gate).mixes_tokens
        if gate_mixes != EXPERTS.get(self.experts).mixes_tokens:
            raise ValueError(
                f"gate={self.gate!r} and experts={self.experts!r} don't go together: of the two "
                f"{'the gate' if gate_mixes else 'the experts'} alone mix tokens. Use "
                "gate='soft_slots' with experts='slot_lora' or 'slot_adapters'."
            )
        if gate_mixes and self.mixing != "linear":
            raise ValueError(f"gate={self.gate!r} mixes tokens, which needs mixing='linear'.")
        if gate_mixes and self.task_type == "CAUSAL_LM":
            self.refuse_non_causal("task_type='CAUSAL_LM'")

    def refuse_non_causal(self, what: str) -> None:
        """Raise `ValueError`, unless the gate's options allow experts to see later tokens."""
        if not self.gate_options.get("allow_non_causal"):
            raise ValueError(
                f"gate={self.gate!r} lets a token see those after it, but {what} predicts the next "
                "token: training would see the answer, and generation would differ from it. It is "
                "meant for encoders; gate_options={'allow_non_causal': True} allows it all the "
                "same, to compare, say."
            )

    def _check_mixing(self) -> None:
        if self.mixing == "linear":
            return
        if GATES.get(self.gate).weighs_shared_expert:
            raise ValueError(
                f"gate={self.gate!r} weighs a shared expert against the routed ones, but with "
                "mixing='feed_forward' shared experts are part of each expert's network; use "
                "another gate, or mixing='linear'."
            )
        if self.bias == "molora_only":
            raise ValueError(
                "bias='molora_only' doesn't reach the linear modules inside a feed-forward "
                "network; with mixing='feed_forward' use 'none' or 'all'."
            )
