"""From targeted linear modules to the feed-forward networks that they belong to."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .allocation import SiteAllocation
from .config import MoloraConfig
from .feedforward import FeedForward
from .feedforward_roles import Roles, check_roles, describe_parts, find_roles
from .sites import Site

ATTENTION = re.compile(r"(?i)att(n|ention)")


@dataclass(frozen=True)
class Network:
    """A feed-forward network of the base model: the module, without adapters, and its roles."""

    module: nn.Module
    roles: Roles


def find_networks(modules: Mapping[str, nn.Module]) -> dict[str, Network]:
    """The feed-forward networks among a model's modules, wrapped ones included, by name."""
    networks = {}
    for name, module in modules.items():
        base = module.get_base_layer() if isinstance(module, FeedForward) else module
        roles = None if isinstance(base, BaseTunerLayer) else find_roles(base)
        if roles is not None:
            networks[name] = Network(base, roles)
    return networks


def wrapped_linears(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The linear modules inside networks that adapters wrap, by the names they had before."""
    return {
        f"{name}.{linear}": getattr(module.get_base_layer(), linear)
        for name, module in modules.items()
        if isinstance(module, FeedForward)
        for linear in module.roles.linears
    }


def gather(
    sites: Iterable[Site], networks: Mapping[str, Network], modules: Mapping[str, nn.Module]
) -> list[Site]:
    """Replace the linear modules of each network by one site, at the place of the first of them.

    Args:
        sites: linear modules, in the order in which they run.
        networks: the model's feed-forward networks by name.
        modules: the model's modules by name.

    Raises:
        ValueError: none of the sites is in a network.
    """
    sites = list(sites)
    gathered: dict[str, list[Site]] = {}
    for site in sites:
        parent = site.name.rpartition(".")[0]
        gathered.setdefault(parent if parent in networks else site.name, []).append(site)
    if not gathered.keys() & networks.keys():
        raise ValueError(
            "mixing='feed_forward', but target_modules names no linear module inside a "
            f"feed-forward network that is known. {_found(sites, networks, modules)}"
        )
    return [
        Site(name, parts[0].layer, *network.roles.sizes(network.module), tuple(parts))
        if (network := networks.get(name)) is not None
        else parts[0]
        for name, parts in gathered.items()
    ]


def check_plan(
    config: MoloraConfig,
    plan: Mapping[str, SiteAllocation],
    networks: Mapping[str, Network],
    modules: Mapping[str, nn.Module],
) -> None:
    """Refuse a plan that would silently mean something else than it says.

    Args:
        config: the adapter's.
        plan: its sites by name.
        networks: the model's feed-forward networks by name, where the config mixes there.
        modules: the model's modules by name, without what is inside adapters.

    Raises:
        ValueError: experts of a feed-forward part that isn't recognised would be mixed module by
            module; a network computes something else than its parts' names say; or adapters would
            stand both on a network and inside it.
    """
    checked = set()
    for name, allocation in plan.items():
        parent = name.rpartition(".")[0]
        if isinstance(modules.get(parent), FeedForward):
            raise _on_and_inside(parent, name)
        if not allocation.parts:
            if config.mixing == "feed_forward" and allocation.is_routed:
                _check_elsewhere(name, parent, modules)
            continue
        network = networks[name]
        for linear in network.roles.linears:
            if isinstance(getattr(network.module, linear), BaseTunerLayer):
                raise _on_and_inside(name, f"{name}.{linear}")
        if type(network.module) not in checked:
            check_roles(name, network.module, network.roles, allocation.site.in_features)
            checked.add(type(network.module))


def _check_elsewhere(name: str, parent: str, modules: Mapping[str, nn.Module]) -> None:
    if ATTENTION.search(name):
        return
    found = f", a {describe_parts(modules[parent])}," if parent in modules else ""
    raise ValueError(
        f"mixing='feed_forward': {name!r} would get routed experts of its own, because "
        f"{parent!r}{found} is no feed-forward network that is known. Give it none (num_experts as "
        "a regex map with 0, num_shared_experts with 1), exclude it, or use mixing='linear'."
    )


def _on_and_inside(network: str, linear: str) -> ValueError:
    return ValueError(
        f"adapters can't stand both on the feed-forward network {network!r} and on {linear!r} "
        "inside it; give all adapters of a model the same mixing and the same routed networks, or "
        "delete the other one."
    )


def _found(
    sites: Iterable[Site], networks: Mapping[str, Network], modules: Mapping[str, nn.Module]
) -> str:
    if networks:
        name, network = next(iter(networks.items()))
        linears = ", ".join(network.roles.linears)
        return f"The model has {len(networks)}, such as {name!r}; name some of its {linears}."
    parents = (site.name.rpartition(".")[0] for site in sites if not ATTENTION.search(site.name))
    parent = next((parent for parent in parents if parent in modules), None)
    found = "" if parent is None else f"; {parent!r} is a {describe_parts(modules[parent])}"
    return f"The model has none{found}. Use mixing='linear' for it."
