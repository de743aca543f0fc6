"""Parameters that live once in an adapter, however many of its sites use them."""

from collections.abc import Hashable, Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class SitePart(nn.Module):
    """What a site of an adapter is made of: its experts, or its router.

    Attributes:
        shared_across_sites: names of the submodules that live once for all sites alike. The first
            of those sites holds them, registered as usual. The others read them under the same
            name, unregistered, so that the state dict, the optimizer and whatever else walks over
            the modules sees each parameter once. They must be submodules: PEFT's casts replace
            parameters, and a site that had got hold of the old one would train it no more.
            Where that can't be, `refuse_out_of_reach` says so.
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


def borrowed(part: nn.Module | None) -> list[nn.Module]:
    """What the experts or the router of a site, if it has any, read that another site holds."""
    if part is None:
        return []
    return [
        m.__dict__[name]
        for m in part.modules()
        if isinstance(m, SitePart)
        for name in m.shared_across_sites
        if name in m.__dict__
    ]


def refuse_out_of_reach(modules: Iterable[nn.Module], site: str, runs_again: bool) -> None:
    """Raise where a site can't read, or train, what a site of another layer holds.

    Args:
        modules: what it reads.
        site: its name.
        runs_again: the layer runs without gradients now and again in backward, as reentrant
            checkpointing does.

    Raises:
        RuntimeError: the parameters are divided among processes and gathered for another layer
            alone (FSDP, ZeRO-3), or the layers' gradients come one by one, and DDP takes one each.
    """
    who = f"the site {site!r} reads parameters that live once in the adapter, in another layer"
    if any(_is_sharded(p) for module in modules for p in module.parameters()):
        raise RuntimeError(
            f"{who}, and here they are divided among the processes and not gathered. Shard the "
            "model as one unit (fsdp_auto_wrap_policy: NO_WRAP in accelerate's configuration, one "
            "fully_shard(model) in a loop of your own), or use DDP or ZeRO-2."
        )
    ddp = DistributedDataParallel._get_active_ddp_module()
    if runs_again and ddp is not None and not ddp.static_graph:
        raise RuntimeError(
            f"{who}; under reentrant checkpointing each layer brings their gradient by itself, and "
            "DDP takes one for each parameter. Set gradient_checkpointing_kwargs="
            "{'use_reentrant': False}, or don't checkpoint."
        )


def _is_sharded(parameter: nn.Parameter) -> bool:
    # FSDP2 leaves a DTensor where it hasn't gathered, ZeRO-3 a tensor without elements.
    return hasattr(parameter, "placements") or parameter.numel() == 0


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
