"""The checks of single values that `MoloraConfig` is made of."""

from collections.abc import Container
from typing import Any

from torch import nn

from .gates import GATES
from .losses import Loss
from .registry import unknown_name_message
from .settings import LeafCheck, check_regex
from .value_types import is_number, is_whole

PerLayer = int | list[Any] | dict[str, Any] | str


def check_top_k(gate_name: str, top_k: int, num_experts: int | None, where: str = "") -> None:
    """Raise `ValueError` when that K can't be used, or would leave the router without gradient."""
    gate = GATES.get(gate_name)
    if num_experts is not None and num_experts > 0 and top_k > num_experts:
        raise ValueError(f"top_k={top_k} is more than the {num_experts} experts{where}.")
    if gate.fixed_top_k is not None and top_k != gate.fixed_top_k:
        raise ValueError(
            f"top_k={top_k} doesn't go with gate={gate_name!r}, which uses "
            f"{gate.fixed_top_k}{where}."
        )
    if gate.needs_two_active and top_k == 1 and num_experts != 1:
        raise ValueError(
            f"top_k=1 with gate={gate_name!r} makes every routing weight 1, so the router would "
            f"get no gradient from the task{where}. Use gate='switch' (top-1 weighted by its "
            "probability), gate='top_k_unnormalized', or top_k >= 2."
        )


def check_gate_loss(gate_name: str, losses: Container[str]) -> None:
    """Raise `ValueError` where the loss is missing that alone trains some of the gate's parts."""
    needed = GATES.get(gate_name).needs_loss
    if needed is not None and needed not in losses:
        raise ValueError(
            f"gate={gate_name!r} has parameters that the loss {needed!r} alone trains: add "
            f"losses={{{needed!r}: 1.0}}, or choose another gate."
        )


def check_router_learns(gate_name: str, router_name: str, has_losses: bool) -> None:
    """Raise `ValueError` where nothing would train the parameters of a router."""
    gate = GATES.get(gate_name)
    if gate.task_trains_router:
        return
    if gate.constant:
        raise ValueError(
            f"gate={gate_name!r} weighs without the logits, so router={router_name!r} would learn "
            "nothing; use router='random', which has nothing to learn, or another gate."
        )
    if not has_losses:
        raise ValueError(
            f"gate={gate_name!r} gives the router no gradient from the task, and there is no loss "
            "to train it: add losses={'load_balancing': 1e-2}, say, choose a gate that weighs by "
            "probability ('switch', 'top_k_unnormalized'), or router='random'."
        )


def check_loss(name: str, loss: Loss, gate_name: str) -> None:
    """Raise `ValueError` where the loss means nothing for the decisions of that gate."""
    gate = GATES.get(gate_name)
    if loss.needs_sparse_gate and not gate.sparse:
        raise ValueError(
            f"losses: {name!r} is constant with gate={gate_name!r}, which uses every "
            "expert for every token; choose a gate that selects, or drop the loss."
        )
    missing = set(loss.reads) - set(gate.leaves)
    if missing:
        able = [n for n in GATES.names() if set(loss.reads) <= set(GATES.get(n).leaves)]
        raise ValueError(
            f"losses: {name!r} reads {sorted(missing)} of a decision, which gate="
            f"{gate_name!r} doesn't leave there; use {' or '.join(f'gate={n!r}' for n in able)}, "
            "or drop the loss."
        )


def as_targets(name: str, value: Any) -> Any:
    """A regex as it is, a list of names as the set that PEFT looks them up in."""
    if value is None:
        return None
    if isinstance(value, str):
        check_regex(name, value)
        return value
    if not _are_names(value):
        raise ValueError(f"{name}={value!r} must be a list of module names, or one regex.")
    return set(value)


def as_names(name: str, value: Any) -> list[str] | None:
    """Names as the list that PEFT adds to."""
    if value is None:
        return None
    if not _are_names(value):
        raise ValueError(f"{name}={value!r} must be a list of module names.")
    return sorted(value) if isinstance(value, set) else list(value)


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(v, str) for v in value)


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raise `ValueError` unless the value is one of the choices, in type too."""
    # `1 in (True, ...)` holds in Python, so the type is compared too.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        known = [repr(c) if isinstance(c, bool) else c for c in choices]
        raise ValueError(unknown_name_message(name, value, known))


def check_adapter_name(name: object) -> None:
    """Raise `ValueError` unless torch takes the name for a module: an adapter's parts have it."""
    try:
        nn.ModuleDict({name: nn.Identity()})  # type: ignore[dict-item]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"adapter_name={name!r} must be a string, not empty and without dots, and none of "
            "torch.nn.ModuleDict's own attributes, such as 'keys'."
        ) from error


def check_provenance(method: object, version: object) -> None:
    """Raise `ValueError` for a method's name alone, which looks as if it brought its settings."""
    if method is not None and not (isinstance(method, str) and is_whole(version)):
        raise ValueError(
            f"method={method!r} with method_version={version!r}: they record what a configuration "
            "was built from, and set none of its fields; MoloraConfig.from_method builds it, and "
            "sets both."
        )


def check_alpha(name: str, value: object) -> None:
    """Raise `ValueError` unless the value is a number above 0."""
    if not is_number(value) or not value > 0:
        raise ValueError(f"{name}={value!r} must be a number above 0.")


def check_not_negative(name: str, value: object) -> None:
    """Raise `ValueError` unless the value is a number of at least 0."""
    if not is_number(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be a number, and not negative.")


def check_count(least: int) -> LeafCheck:
    """A check that raises `ValueError` unless the value is a whole number of at least `least`."""

    def check(name: str, value: object) -> None:
        if not is_whole(value) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")

    return check


def check_layers(layers: Any) -> None:
    """Raise `ValueError` unless it is None, the number of a layer or a list of some."""
    if layers is not None:
        _check_indices(
            "layers_to_transform", layers if isinstance(layers, list | tuple) else [layers]
        )


def check_token_rows(tokens: Any) -> None:
    """Raise `ValueError` unless it is None, a list of token ids or one for each embedding."""
    for rows in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if rows is not None:
            _check_indices("trainable_token_indices", rows)


def _check_indices(name: str, value: Any) -> None:
    # PEFT takes an empty list of layers for all of them, and fails on one of tokens.
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{name}={value!r} must be a list of numbers, one at least, or None.")
    for index in value:
        check_count(0)(name, index)


def some_count(setting: PerLayer) -> int:
    """A number of experts that the setting names, or 2."""
    if isinstance(setting, dict):
        setting = list(setting.values())
    if isinstance(setting, list):
        setting = setting[0]
    return setting if isinstance(setting, int) and setting > 0 else 2


def check_rank(name: str, value: object) -> None:
    """Raise `ValueError` unless the value is a rank, or a list of ranks."""
    for rank in value if isinstance(value, list | tuple) and value else [value]:
        check_count(1)(name, rank)
