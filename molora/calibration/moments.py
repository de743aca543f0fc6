"""What one pass over the data leaves of it: sums in rank space, and of products of the input.

A site's experts add B v to the base output, with v = G u and u = A x (R). Whatever is fitted to B v
by least squares depends on the data through sums over the tokens alone:

    u u^T, u v^T, v v^T     (R, R), for fixed routing weights
    v x^T, x x^T            (R, d_in), (d_in, d_in), for any linear map

Only the last is large. Sites that read the same tensor (q, k, v; gate, up) share it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..evaluating import evaluating
from ..experts import Experts
from ..fixed_routing import check_only, on_device_of
from ..layer import MoloraLayer, adapted_layers
from ..observe import routing_contexts
from ..routing import Routing

Batch = Mapping[str, Any]


class InputMoment:
    """The sum of x x^T (d_in, d_in) over the real tokens, in fp32 (fp64 in fp64 models).

    Args:
        site: the site that adds; others may read the same input.
    """

    def __init__(self, site: str) -> None:
        self.site = site
        self.xx: Tensor | None = None
        self._inverses: dict[float, tuple[Tensor, Tensor]] = {}

    def add(self, x: Tensor, device: torch.device | None) -> None:
        product = (x.T @ x).to(device or x.device)
        self.xx = product if self.xx is None else self.xx.add_(product)

    def forget(self) -> None:
        """Let what `regularized` made go."""
        self._inverses.clear()

    def regularized(self, ridge: float) -> tuple[Tensor, Tensor]:
        """In fp64, S = sum of x x^T, and the (pseudo-)inverse of S + ridge * mean(diag S) I."""
        if ridge not in self._inverses:
            assert self.xx is not None, "a site that ran has added its input"
            S = self.xx.double()
            if ridge > 0:
                penalty = ridge * S.diagonal().mean().clamp(min=torch.finfo(S.dtype).tiny)
                root = torch.linalg.cholesky(S + penalty * torch.eye(len(S)).to(S))
                inverse = torch.cholesky_inverse(root)
            else:
                tolerance = len(S) * torch.finfo(self.xx.dtype).eps
                inverse = torch.linalg.pinv(S, hermitian=True, rtol=tolerance)
            self._inverses = {ridge: (S, inverse)}
        return self._inverses[ridge]


class SiteMoments:
    """The sums of one site.

    Args:
        experts: its experts, as they are now.
        source: the sum of its input's products; None where no linear map is to be fitted.
        device: where sums are kept; None for where the site computes.

    Attributes:
        tokens: real tokens that were counted.
        weights: (n,) sum of the routing weights; None where nothing is routed. n is E, or E + S
            where the gate weighs the S shared experts too.
        uu, uv, vv: (R, R) fp64.
        vx: (R, d_in) fp64, where a linear map is to be fitted.
    """

    def __init__(
        self, experts: Experts, source: InputMoment | None, device: torch.device | None
    ) -> None:
        self.factors = experts.lora_factors()
        self.source = source
        self.device = device or self.factors.A.device
        rank, d_in = self.factors.A.shape
        self.tokens = 0
        self.weights: Tensor | None = None
        self.uu = torch.zeros(rank, rank, dtype=torch.float64, device=self.device)
        self.uv, self.vv = self.uu.clone(), self.uu.clone()
        self.vx = torch.zeros(rank, d_in, dtype=torch.float64, device=self.device)

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """Count the real tokens x (T, d_in) with their routing weights (T, n)."""
        u = x @ self.factors.A.T
        v = u if weights is None else u * self.factors.per_rank(weights)
        self.tokens += len(x)
        if weights is not None:
            total = weights.double().sum(0).to(self.device)
            self.weights = total if self.weights is None else self.weights + total
        wide_u, wide_v = u.double(), v.double()
        self.uu += (wide_u.T @ wide_u).to(self.device)
        self.uv += (wide_u.T @ wide_v).to(self.device)
        self.vv += (wide_v.T @ wide_v).to(self.device)
        if self.source is not None:
            self.vx += (v.T @ x).to(self.device)


class MomentCollector:
    """Hooks on the sites of an adapter that add up `SiteMoments`."""

    def __init__(
        self,
        layers: Mapping[str, MoloraLayer],
        adapter_name: str,
        linear_maps: bool,
        device: torch.device | None,
    ) -> None:
        self.moments: dict[str, SiteMoments] = {}
        self.records: dict[str, list[Routing]] = {}
        self._layers = layers
        self._adapter = adapter_name
        self._linear_maps = linear_maps
        self._device = device
        self._previous: tuple[Tensor | None, InputMoment | None] = (None, None)

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Collect during the block."""
        handles = [
            cast(nn.Module, layer).register_forward_hook(partial(self._add, site))
            for site, layer in self._layers.items()
        ]
        contexts = routing_contexts(model)
        before = [context.records for context in contexts]
        for context in contexts:
            context.records = self.records
        try:
            yield
        finally:
            for context, records in zip(contexts, before, strict=True):
                context.records = records
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(self, site: str, layer: nn.Module, args: tuple, output: Tensor) -> None:
        assert isinstance(layer, MoloraLayer)
        source: Tensor = args[0]
        decided = self.records.pop(site, None)
        if layer.disable_adapters or (decided is None and layer.is_routed(self._adapter)):
            return  # a pass that leaves the adapter out, such as X-LoRA's first
        routing = None if decided is None else decided[-1]
        x = source.detach().flatten(0, -2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weights = None if routing is None else routing.all_weights
        mask = layer.routing_context.token_mask(layer.token_mask, source)
        if mask is not None:
            x = x[mask]
            weights = None if weights is None else weights[mask]
        if site not in self.moments:
            experts = layer.experts_of(self._adapter)
            self.moments[site] = SiteMoments(experts, self._input_of(site, source), self._device)
        moments = self.moments[site]
        moments.add(x, weights)
        if moments.source is not None:
            if moments.source.site == site:
                moments.source.add(x, self._device)
            elif self._previous[0] is not source:
                raise RuntimeError(
                    f"{site!r} read the input of {moments.source.site!r} in one pass and another "
                    "in the next."
                )
            self._previous = (source, moments.source)

    def _input_of(self, site: str, source: Tensor) -> InputMoment | None:
        """That of the site that ran just before, if it read the very same tensor."""
        if not self._linear_maps:
            return None
        known, moment = self._previous
        return moment if known is source else InputMoment(site)

    def end_of_pass(self) -> None:
        """Let the last input go."""
        self._previous = (None, None)


def collect_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    adapter_name: str = "default",
    linear_maps: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, SiteMoments]:
    """One pass over the batches, in evaluation mode; the sums of each site that ran.

    Padding (`attention_mask`) is never counted. For linear maps it keeps d_in^2 numbers for each
    distinct input of a site: 64 MiB in fp32 where d_in is 4096.

    Args:
        model: a model of which this adapter, and no other, is active and not merged.
        batches: keyword arguments of the model's forward.
        adapter_name: the adapter.
        linear_maps: collect what "full" and "low_rank" need, too.
        device: where the sums are kept; None for where each site computes, "cpu" to spare the
            accelerator's memory.
        progress: show a bar.

    Raises:
        ValueError: other adapters are at work too, or this one is merged or disabled; the experts
            aren't linear; the batches hold no real token; several processes calibrate.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise ValueError(
                f"{processes} processes calibrate, each on data of its own; calibrate in one."
            )
    layers = adapted_layers(model, adapter_name)
    check_only(layers, adapter_name)
    where = None if device is None else torch.device(device)
    collector = MomentCollector(layers, adapter_name, linear_maps, where)
    total = len(batches) if isinstance(batches, Sized) else None
    with evaluating(model), collector.listening(model), torch.no_grad():
        for batch in tqdm(batches, "Calibrating", total, disable=not progress):
            model(**on_device_of(model, batch))
            collector.end_of_pass()
    if not any(moments.tokens for moments in collector.moments.values()):
        raise ValueError("the batches hold no real token to calibrate on.")
    return collector.moments
