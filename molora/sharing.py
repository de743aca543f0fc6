"""Parameters that live once in an adapter, however many of its sites use them."""

from collections.abc import Hashable

from torch import nn


class SitePart(nn.Module):
    """What a site of an adapter is made of: its experts, or its router.

    Attributes:
        shared_across_sites: names of the submodules that live once for all sites alike. The first
            of those sites holds them, registered as usual. The others read them under the same
            name, unregistered, so that the state dict, the optimizer and whatever else walks over
            the modules sees each parameter once. They must be submodules: PEFT's casts replace
            parameters, and a site that had got hold of the old one would train it no more.
            A wrapper that shards layer by layer, such as FSDP, gathers them for the first site's
            layer alone, and the other layers fail: shard the model as one unit, or use DDP.
        frozen_parameters: names of parameters that never train, whatever PEFT switches on.
    """

    shared_across_sites: tuple[str, ...] = ()
    frozen_parameters: tuple[str, ...] = ()

    def sharing_key(self, name: str) -> Hashable:
        """Of the sites alike, those with equal keys share the submodule `name`; all by default."""
        return None

    def share_with(self, leader: "SitePart", name: str) -> None:
        """Drop the own copy of the submodule `name`, and use the leader's from now on.

        Raises:
            ValueError: the leader's has other shapes.
        """
        ours, theirs = _shapes(getattr(self, name)), _shapes(getattr(leader, name))
        if ours != theirs:
            raise ValueError(
                f"{type(self).__name__} can't share {name!r}: here its parameters are {ours}, at "
                f"the site that holds them {theirs}."
            )
        delattr(self, name)
        # Past nn.Module.__setattr__, which would register it here too.
        self.__dict__[name] = getattr(leader, name)


def share(part: SitePart, group: Hashable, leaders: dict[Hashable, SitePart]) -> None:
    """Let a part use what the first of its group holds, or hold it for the others.

    Args:
        part: the experts or the router of one site.
        group: equal for the sites of one adapter that share.
        leaders: the first part of each group so far; a new one is added.
    """
    for name in part.shared_across_sites:
        key = (type(part), group, name, part.sharing_key(name))
        leader = leaders.setdefault(key, part)
        if leader is not part:
            part.share_with(leader, name)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
