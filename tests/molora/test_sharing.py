"""Parameters that live once in an adapter, through everything that may be done to a model."""

import copy
import io
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from molora import Experts, MoloraConfig, Router
from molora.experts import EXPERTS
from molora.layer import MoloraLayer
from molora.routers import ROUTERS

from .test_contract import gradients


class BankExperts(Experts):
    """y += sum over e of w_e s V_e (u x), the map u being the adapter's and V the site's."""

    shared_across_sites = ("bank",)

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.bank = nn.Linear(self.in_features, 3, bias=False)
        self.V = nn.Parameter(torch.zeros(len(self.ranks), self.out_features, 3))
        self.sites, self.position = spec.sites, spec.position

    def reset_parameters(self, init: Any, base_weight: Any) -> None:
        nn.init.normal_(self.bank.weight)
        (nn.init.zeros_ if init else nn.init.normal_)(self.V)

    def forward(self, hidden: Tensor, weights: Tensor | None, result: Tensor) -> Tensor:
        assert weights is not None
        mixed = torch.einsum("te,eok->tok", weights.to(self.V.dtype), self.V)
        inner = self.bank(hidden.to(self.V.dtype)).reshape(-1, 3, 1)
        return result + (mixed @ inner).view(result.shape).to(result.dtype)


class BankRouter(Router):
    """z = W x + b, W being the adapter's and b the site's."""

    shared_across_sites = ("map",)

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__(in_features, num_experts)
        self.map = nn.Linear(in_features, num_experts, bias=False)
        self.b = nn.Parameter(torch.zeros(num_experts))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.map.weight)

    def compute_logits(self, inputs: Any) -> Tensor:
        return F.linear(inputs.hidden.float(), self.map.weight.float(), self.b.float())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(EXPERTS._entries, "bank", BankExperts)
    monkeypatch.setitem(ROUTERS._entries, "bank", BankRouter)


def config(**fields: Any) -> MoloraConfig:
    defaults: dict[str, Any] = {
        "experts": "bank", "router": "bank", "num_experts": 3, "r": 1,
        "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    }  # fmt: skip
    return MoloraConfig(**{**defaults, **fields})


@pytest.fixture
def model(tiny_model, randomize) -> Any:
    return randomize(get_peft_model(tiny_model("llama"), config()).eval())


def sites(model: Any) -> dict[str, MoloraLayer]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, MoloraLayer)}
    return {n.partition("layers.")[2]: m for n, m in found.items()}


def shared(model: Any) -> list[str]:
    """Names of the parameters that live once."""
    return [n for n, _ in model.named_parameters() if ".bank." in n or ".map." in n]


def one_bank_for_each_module(model: Any, adapter: str = "default") -> bool:
    """Both layers read the same tensors, and q_proj others than v_proj."""
    found = sites(model)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
        first, second = (found[f"{i}.{module}"] for i in (0, 1))
        for parts in ("molora_experts", "molora_router"):
            name = "bank" if parts == "molora_experts" else "map"
            one, two = (getattr(getattr(s, parts)[adapter], name) for s in (first, second))
            if one.weight is not two.weight:
                return False
    q, v = (found[f"0.self_attn.{m}_proj"].molora_experts[adapter].bank for m in "qv")
    return q.weight is not v.weight


def test_the_first_site_holds_what_the_others_use(model, tiny_batch, logits_of):
    assert one_bank_for_each_module(model)
    names = shared(model)
    assert len(names) == 6 and all(".layers.0." in name for name in names)
    assert [n for n in model.state_dict() if ".bank." in n or ".map." in n] == names
    experts = sites(model)["1.mlp.up_proj"].molora_experts["default"]
    assert (experts.sites, experts.position) == (2, 1)
    before = logits_of(model, tiny_batch("llama"))
    second = sites(model)["1.self_attn.q_proj"]
    second.molora_experts["default"].bank.weight.data.mul_(3)
    assert not torch.equal(logits_of(model, tiny_batch("llama")), before)


def test_unequal_sites_share_nothing(tiny_model):
    model = get_peft_model(tiny_model("llama"), config(num_experts=[2, 3]))
    assert len([n for n in shared(model) if "molora_experts" in n]) == 6
    assert len([n for n in shared(model) if "molora_router" in n]) == 6


def test_other_shapes_are_refused():
    one, two = (BankRouter(4, count) for count in (2, 3))
    with pytest.raises(ValueError, match=r"can't share 'map': here .*\(3, 4\).*holds them .*\(2,"):
        two.share_with(one, "map")


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_the_gradient_is_that_of_all_sites_together(model, tiny_batch, reentrant):
    """Against a model in which every site has a copy of its own."""
    batch = tiny_batch("llama")
    apart = copy.deepcopy(model).train()
    for site in sites(apart).values():
        for parts, name in ((site.molora_experts, "bank"), (site.molora_router, "map")):
            own = copy.deepcopy(getattr(parts["default"], name))
            parts["default"].__dict__.pop(name, None)
            parts["default"].add_module(name, own)
    separate = gradients(apart, batch)
    model.train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    together = gradients(model, batch)
    for name in shared(model):
        expected = separate[name] + separate[name.replace(".layers.0.", ".layers.1.")]
        assert together[name].abs().max() > 0
        torch.testing.assert_close(together[name], expected, atol=1e-6, rtol=1e-5)


def test_saved_and_loaded(model, tiny_model, tiny_batch, logits_of, tmp_path):
    expected = logits_of(model, tiny_batch("llama"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert torch.equal(logits_of(loaded, tiny_batch("llama")), expected)
    assert one_bank_for_each_module(loaded)
    model.load_adapter(tmp_path, adapter_name="other")
    model.set_adapter("other")
    assert torch.equal(logits_of(model, tiny_batch("llama")), expected)
    native = tiny_model("llama")
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(native.eval(), tiny_batch("llama")), expected)
    native.save_pretrained(tmp_path / "native")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "native").eval()
    assert torch.equal(logits_of(again, tiny_batch("llama")), expected)


def saved_whole(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_whole])
def test_a_copy_shares_within_itself(model, tiny_batch, logits_of, duplicate):
    twin = duplicate(model)
    assert one_bank_for_each_module(twin)
    expected = logits_of(model, tiny_batch("llama"))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits_of(model, tiny_batch("llama")), expected)


def test_each_adapter_shares_within_itself(model, tiny_batch, logits_of):
    batch = tiny_batch("llama")
    expected = logits_of(model, batch)
    model.add_adapter("second", config(target_modules=["q_proj", "v_proj", "up_proj"]))
    assert one_bank_for_each_module(model) and one_bank_for_each_module(model, "second")
    model.set_adapter("second")
    assert not torch.equal(logits_of(model, batch), expected)
    trainable = [n for n in shared(model) if model.get_parameter(n).requires_grad]
    assert len(trainable) == 6 and all(".second." in name for name in trainable)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert len(shared(model)) == 6
    assert torch.equal(logits_of(model, batch), expected)


def test_casts_reach_every_site(tiny_model, tiny_batch):
    """PEFT makes a bf16 model's adapters fp32 by replacing their parameters."""
    model = get_peft_model(tiny_model("llama").bfloat16(), config()).train()
    assert one_bank_for_each_module(model)
    before = {name: model.get_parameter(name).detach().clone() for name in shared(model)}
    assert all(tensor.dtype == torch.float32 for tensor in before.values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny_batch("llama")).loss.backward()
    optimizer.step()
    assert all(not torch.equal(model.get_parameter(name), old) for name, old in before.items())
    assert one_bank_for_each_module(model)
    assert one_bank_for_each_module(model.double())
