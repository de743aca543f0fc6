"""Adapters of equal size: the rank that gives a configuration a number of trainable parameters."""

import math
import warnings
from dataclasses import dataclass

from peft import get_peft_model

from molora import MoloraConfig
from molora.architecture import empty_model


@dataclass(frozen=True)
class SizedConfig:
    """A configuration and the trainable parameters that it gives a model."""

    config: MoloraConfig
    parameters: int


def sized(config: MoloraConfig, model: str) -> SizedConfig:
    """The configuration with its number of parameters on a model, of which no weight is read."""
    with warnings.catch_warnings():
        # PEFT's calls of deprecated parts of transformers are no matter of who compares methods
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(empty_model(model), config, low_cpu_mem_usage=True)
    return SizedConfig(config, adapted.get_nb_trainable_parameters()[0])


def match_rank(config: MoloraConfig, parameters: int, model: str, name: str) -> SizedConfig:
    """The configuration with the rank `r` whose number of parameters comes nearest.

    That number is taken to grow evenly with the rank, as factors and routers by activation do.
    alpha follows the rank, so that the factor on the experts' output stays what it was.

    Args:
        config: how the adapter is made; its `r` only says where alpha belongs.
        parameters: trainable parameters to come near to, routers included.
        model: folder or name of the base model.
        name: of the method, for messages.

    Raises:
        ValueError: `r` isn't one number, or doesn't change the size, or can't have that value.
    """
    if not isinstance(config.r, int):
        raise ValueError(
            f"{name!r} has ranks of its own, r={config.r!r}, which no single number replaces; set "
            "equal_size: false, or leave the method out."
        )

    def with_rank(rank: int) -> SizedConfig:
        try:
            return sized(_with_rank(config, rank), model)
        except ValueError as error:
            raise ValueError(
                f"{name!r} doesn't take r={rank}, by which it would come nearer to {parameters:,} "
                f"trainable parameters: {error} Set equal_size: false, name another method first, "
                "or leave this one out."
            ) from error

    own = sized(config, model).parameters
    per_rank = (with_rank(2 * config.r).parameters - own) / config.r
    if per_rank <= 0:
        raise ValueError(
            f"{name!r} has {own:,} trainable parameters whatever its rank; set equal_size: false, "
            "or leave the method out."
        )
    return with_rank(max(1, config.r + round((parameters - own) / per_rank)))


def _with_rank(config: MoloraConfig, rank: int) -> MoloraConfig:
    assert isinstance(config.r, int)
    ratio = rank / config.r
    factor = {"alpha/r": ratio, "alpha/sqrt(r)": math.sqrt(ratio), "constant": 1.0}
    alpha = config.lora_alpha * factor[config.scaling_rule]
    return MoloraConfig(**{**config.to_dict(), "r": rank, "lora_alpha": alpha})
