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
        frozen_parameters: names of parameters that never train, whatever PEFT switches on.
    """

    shared_across_sites: tuple[str, ...] = ()
    frozen_parameters: tuple[str, ...] = ()

    def share_with(self, leader: "SitePart") -> None:
        """Drop the own copies of what is shared, and use the leader's from now on.

        Raises:
            ValueError: the leader's have other shapes.
        """
        for name in self.shared_across_sites:
            ours, theirs = _shapes(getattr(self, name)), _shapes(getattr(leader, name))
            if ours != theirs:
                raise ValueError(
                    f"{type(self).__name__} can't share {name!r}: here its parameters are {ours}, "
                    f"at the site that holds them {theirs}."
                )
        for name in self.shared_across_sites:
            delattr(self, name)
            # Past nn.Module.__setattr__, which would register it here too.
            self.__dict__[name] = getattr(leader, name)


def share(part: SitePart, group: Hashable, leaders: dict[Hashable, SitePart]) -> None:
    """Let a part use what the first of its group holds, or become the first.

    Args:
        part: the experts or the router of one site.
        group: equal for the sites of one adapter that share.
        leaders: the first part of each group so far; a new one is added.
    """
    if not part.shared_across_sites:
        return
    leader = leaders.setdefault((type(part), group), part)
    if leader is not part:
        part.share_with(leader)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
