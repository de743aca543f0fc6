"""A mixture of whole feed-forward networks as a mixture-of-experts model of transformers.

Each expert becomes a network of its own, W + s B A, so that engines with fused kernels for such
models serve it: Llama and Mistral become Mixtral, Qwen2 Qwen2-MoE, Qwen3 Qwen3-MoE.

Shared LoRA experts are inside every expert's network, FFN(W + shared + own), and are folded into
each. They are no network beside the experts, whose output is added, as the shared experts of
Qwen2-MoE and DeepSeek are: there, the routed part is sum over e of w_e FFN_e(x) as here, but a
network more is added to it, which Qwen2-MoE multiplies by a sigmoid. Qwen2-MoE needs one, and gets
one of a single inner feature and weights of 0, which adds 0.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..config_checks import check_count
from ..experts import Experts
from ..feedforward import FeedForward
from ..feedforward_experts import FeedForwardExperts
from ..gates.dense import Dense
from ..gates.switch import Switch
from ..gates.top_k import TopK
from ..gates.top_k_unnormalized import TopKUnnormalized
from ..routers.linear import LinearRouter
from .card import write_card
from .folder import new_folder
from .moe_config import FAMILIES, Family, sparse_config
from .peft_folder import Source, source_of

# Gates that weigh by the softmax of all logits -> whether the weights of a token's experts are
# divided by their sum; None where they sum to 1 as they are.
SOFTMAX_GATES: dict[type[nn.Module], bool | None] = {
    TopK: True,
    TopKUnnormalized: False,
    Switch: False,
    Dense: None,
}
SHARD_BYTES = 4 * 10**9


def export_moe(
    model: nn.Module,
    out_dir: str | Path,
    tokenizer: Any = None,
    *,
    adapter_name: str = "default",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write the model as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    Weights are merged in fp32, layer by layer as they are written, and kept in the base model's
    dtype; so is the router. Adapters elsewhere that route nothing, such as MixLoRA's on attention,
    are folded in. The model is left as it was.

    Args:
        model: a PEFT model with an adapter of mixing="feed_forward" on every layer's network.
        out_dir: folder to be made; it appears when everything in it is written.
        tokenizer: is written beside it.
        adapter_name: which adapter.
        shard_bytes: largest file of weights.
        overwrite: replace a folder that isn't empty.

    Returns:
        The folder.

    Raises:
        ValueError: the model or the adapter isn't what the architecture computes, or `shard_bytes`
            isn't a whole number of at least 1.
        FileExistsError: the folder isn't empty.
    """
    check_count(1)("shard_bytes", shard_bytes)
    source = source_of(model, adapter_name)
    for site, layer in source.layers.items():
        if any(p.is_meta for p in cast(nn.Module, layer).parameters()):
            raise ValueError(f"the weights of {site!r} are not loaded; load the model whole.")
    base = cast(Any, model).get_base_model()
    family, networks, config = _counterpart(base, source)
    with new_folder(out_dir, overwrite) as folder:
        shards = _Shards(folder, shard_bytes)
        for key, tensor in _tensors(base, source, networks, family):
            shards.add(key, tensor)
        shards.finish()
        if base.generation_config is not None:
            base.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        title = f"A {family.architecture} of merged LoRA experts"
        note = "Each expert is the base model's feed-forward network with one LoRA folded in."
        write_card(folder, title, source, [note], library="transformers")
        config.save_pretrained(folder)
    return Path(out_dir)


def planned_moe(model: nn.Module, source: Source) -> tuple[str, int]:
    """What `export_moe` would write, in words, and its size in bytes; nothing is computed.

    Raises:
        ValueError: what the export itself would raise.
    """
    base = cast(Any, model).get_base_model()
    _, _, config = _counterpart(base, source)
    with torch.device("meta"):
        sparse = AutoModelForCausalLM.from_config(config)
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    what = f"a {type(sparse).__name__} of {experts} experts a layer"
    return what, sum(weight.numel() for weight in sparse.parameters()) * base.dtype.itemsize


def _counterpart(base: Any, source: Source) -> tuple[Family, list[FeedForward], PretrainedConfig]:
    """The architecture, the network of each layer, and the checkpoint's configuration."""
    family = FAMILIES.get(type(base).__name__)
    if family is None:
        raise ValueError(
            f"a {type(base).__name__} has no mixture-of-experts counterpart here; known: "
            f"{', '.join(FAMILIES)}. Keep the adapter as it is (save_pretrained)."
        )
    networks = _networks(source, base.config.num_hidden_layers)
    first = networks[0].molora_allocation[source.adapter_name]
    gate = type(networks[0].molora_gate[source.adapter_name])
    sizes = (len(first.ranks), first.top_k or len(first.ranks))
    config = sparse_config(base.config, family, *sizes, SOFTMAX_GATES[gate])
    return family, networks, config


def _networks(source: Source, num_layers: int) -> list[FeedForward]:
    """The site of each layer's network.

    Raises:
        ValueError: the adapter does what the architecture doesn't.
    """
    networks = [layer for layer in source.layers.values() if isinstance(layer, FeedForward)]
    for network in networks:
        _check_network(network, source.adapter_name)
    for site, layer in source.layers.items():
        if layer.merged:
            raise ValueError(f"an adapter is merged into {site!r}; unmerge it first.")
        if layer not in networks and layer.static_mixture(source.adapter_name) is None:
            raise ValueError(
                f"{site!r} routes experts of its own, but only whole feed-forward networks are "
                "experts in that architecture; train with mixing='feed_forward' and no experts "
                "elsewhere (the method 'mixlora'), or write molora.export_bundle."
            )
    sites = {layer.molora_allocation[source.adapter_name].site.name for layer in networks}
    missing = [i for i in range(num_layers) if f"model.layers.{i}.mlp" not in sites]
    if missing:
        raise ValueError(
            f"layers {missing} have no routed network (mixing='feed_forward'), but every layer of "
            "that architecture has experts; adapt them all, without layers_to_transform."
        )
    kinds = {
        (len(allocation.ranks), allocation.top_k)
        for allocation in (layer.molora_allocation[source.adapter_name] for layer in networks)
    }
    if len(kinds) > 1:
        raise ValueError(
            f"the layers have different numbers of experts and top_k, {sorted(kinds)}; that "
            "architecture has one of each for all layers."
        )
    return networks


def _check_network(layer: FeedForward, adapter: str) -> None:
    site = layer.molora_allocation[adapter].site.name
    if adapter not in layer.molora_router:
        raise ValueError(
            f"{site!r} follows another site's router, but in that architecture every layer has its "
            "own; train with router_scope='site'."
        )
    router, gate = layer.molora_router[adapter], layer.molora_gate[adapter]
    if type(router) is not LinearRouter or router.bias is not None:
        raise ValueError(
            f"the router of {site!r} is {router}, but that architecture's is linear without bias "
            "(router='linear')."
        )
    if type(gate) not in SOFTMAX_GATES:
        raise ValueError(
            f"the gate of {site!r} is {gate}, but that architecture's is the softmax of a fixed "
            "number of logits (gate='top_k', as the method 'mixlora' has; for Qwen2 and Qwen3 "
            "'top_k_unnormalized' and 'switch' too, and 'dense'); train with one of these."
        )


def _tensors(
    base: Any, source: Source, networks: list[FeedForward], family: Family
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of the checkpoint, one at a time."""
    numbers = {network: number for number, network in enumerate(networks)}
    tied = set(base._tied_weights_keys or ()) if base.config.tie_word_embeddings else set()
    for key, value in base.state_dict().items():
        if ".molora_" in key or key in tied:
            continue
        name = key.replace(".base_layer", "")
        module = name.rpartition(".")[0]
        parent, _, linear = module.rpartition(".")
        network = source.layers.get(parent)
        if isinstance(network, FeedForward):
            yield from _experts(network, source, linear, value, family, numbers[network])
        elif module in source.layers and name.endswith(".weight"):
            yield name, _plus(value, source.layers[module].get_delta_weight(source.adapter_name))
        else:
            yield name, value
    for network in networks:
        router = cast(LinearRouter, network.molora_router[source.adapter_name])
        weight = router.weight.detach() / router.temperature
        dtype = next(network.base_layer.parameters()).dtype
        yield family.router.format(layer=numbers[network]), weight.to(dtype)
        for key, shape in family.zeros.items():
            sizes = (base.config.hidden_size if size is None else size for size in shape)
            yield key.format(layer=numbers[network]), weight.new_zeros(*sizes, dtype=dtype)


def _experts(
    network: FeedForward, source: Source, linear: str, weight: Tensor, family: Family, layer: int
) -> Iterator[tuple[str, Tensor]]:
    """A linear module of the network once for each expert, with the expert folded in."""
    experts = cast(FeedForwardExperts, network.molora_experts[source.adapter_name])
    count = len(network.molora_allocation[source.adapter_name].ranks)
    for expert, one_hot in enumerate(torch.eye(count)):
        key = family.expert.format(layer=layer, expert=expert, linear=family.linears[linear])
        merged = weight.clone()
        if linear in experts.linears:
            merged = _plus(weight, cast(Experts, experts.linears[linear]).delta_weight(one_hot))
        yield key, merged


def _plus(weight: Tensor, delta: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return (weight.detach().to(wide) + delta.detach().to(weight.device, wide)).to(weight.dtype)


class _Shards:
    """Safetensors files of limited size, and the index that transformers finds them by."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.files: list[list[str]] = []
        self.total = 0
        self._waiting: dict[str, Tensor] = {}
        self._size = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor, and write the file when it has become full."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._size + size > self.limit:
            self._write()
        self._waiting[key] = tensor.detach().to("cpu").contiguous()
        self._size += size
        self.total += size

    def finish(self) -> None:
        """Write what is left, give the files their names, and the index if there are several."""
        self._write()
        count = len(self.files)
        weight_map = {}
        for number, keys in enumerate(self.files):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            if count == 1:
                name = "model.safetensors"
            self._path(number).rename(self.folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")

    def _write(self) -> None:
        save_file(self._waiting, self._path(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self._waiting))
        self._waiting, self._size = {}, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"
