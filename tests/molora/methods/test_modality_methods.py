"""MoIIE, MoMa, PILL and SMAR from their formulas, and what they ask of a batch."""

import pytest
import torch
from peft import get_peft_model

import molora
from molora import MoloraConfig
from molora.routers import ModalityGroupsRouter


def top_2(p):
    w = p * (p >= p.sort(-1, descending=True).values[:, 1:2])
    return w / w.sum(-1, keepdim=True)


def moiie(site):
    E = len(site.ranks)
    own = E // 4
    groups = [[*range(own), *range(2 * own, E)], [*range(own, 2 * own), *range(2 * own, E)]]
    modality = site.labels["modality_ids"].flatten()
    p, losses = torch.zeros(len(site.x), E, dtype=torch.float64), []
    for m, experts in enumerate(groups):
        z = site.x @ site.p["router.weight"][m][experts].T
        rows = modality == m
        p[rows.nonzero(), torch.tensor(experts)] = z.softmax(-1)[rows]
    w = top_2(p)
    for m, experts in enumerate(groups):
        counted = site.mask & (modality == m)
        used, mean = (w[counted] > 0).double().mean(0), p[counted].mean(0)
        losses.append(len(experts) / used.sum() * (used * mean).sum())
    return site.mix(w), {"modality_balancing": sum(losses) / 2}


def test_moiie(fidelity):
    config = MoloraConfig.from_method("moiie", r=2, num_experts=[8, 4])
    case = fidelity(config, seed=2)
    case.check(moiie)
    case.check(lambda site: moiie(site)[0], train=False)


def moma(site):
    E = len(site.ranks)
    modality = site.labels["modality_ids"].flatten()
    w, losses = torch.zeros(len(site.x), E, dtype=torch.float64), []
    for m in (0, 1):
        mine = torch.arange(E // 2) + m * E // 2
        p = (site.x @ site.p["router.weight"][m][mine].T).softmax(-1)
        best = p.argmax(-1)
        rows = (modality == m).nonzero()[:, 0]
        w[rows, mine[best[rows]]] = p[rows, best[rows]]
        counted = site.mask & (modality == m)
        share = torch.nn.functional.one_hot(best[counted], E // 2).double().mean(0)
        losses.append(E // 2 * (share * p[counted].mean(0)).sum())
    return site.mix(w), {"modality_balancing": sum(losses) / 2}


def test_moma(fidelity):
    case = fidelity(MoloraConfig.from_method("moma", r=2, num_experts=[8, 4]), seed=2)
    case.check(moma)
    case.check(lambda site: moma(site)[0], train=False)


def pill(site):
    text, image = site.outputs()
    is_image = site.labels["modality_ids"].flatten()[:, None] == 1
    return site.base() + torch.where(is_image, image, text)


@pytest.mark.parametrize("train", [True, False])
def test_pill(fidelity, train: bool):
    case = fidelity(MoloraConfig.from_method("pill", r=[2, 3]))
    case.check(pill, train=train)
    assert not any("router" in name for name, _ in case.model.named_parameters())


def smar(site):
    modality = site.labels["modality_ids"].flatten()
    z = site.x @ site.p["router.weight"].T + site.p["router.modality_bias"].T[modality]
    p = z.softmax(-1)
    w = top_2(p)
    text, image = (p[site.mask & (modality == m)].mean(0) for m in (0, 1))
    divergence = (text * (text / image).log() + image * (image / text).log()).sum()
    band = (LOW - divergence).clamp(min=0) + (divergence - HIGH).clamp(min=0)
    used = site.token_mean((w > 0).double())
    balance = len(site.ranks) / used.sum() * (used * site.token_mean(p)).sum()
    return site.mix(w), {"load_balancing": balance, "modality_kl": band}


@pytest.mark.parametrize("band", [(1.5, 2.0), (0.0, 1e-4), (0.0, 9.0)], ids=["low", "high", "in"])
def test_smar(fidelity, band: tuple[float, float]):
    global LOW, HIGH
    LOW, HIGH = band
    losses = {"load_balancing": 1e-2, "modality_kl": {"coefficient": 0.3, "low": LOW, "high": HIGH}}
    config = MoloraConfig.from_method("smar", r=2, num_experts=[4, 3], losses=losses)
    fidelity(config, seed=2).check(smar)


def test_published_bands_are_the_default():
    (_, loss) = MoloraConfig.from_method("smar").build_losses()["modality_kl"]
    assert (loss.low, loss.high) == (1.5, 2.0)


@pytest.mark.parametrize("name", ["moiie", "moma", "pill", "smar"])
def test_one_modality_alone(name: str, tiny_model, tiny_batch):
    config = MoloraConfig.from_method(name)
    model = get_peft_model(tiny_model("llama"), config).train()
    for modality in (0, 1):
        model.zero_grad()
        model(**tiny_batch("llama"), modality_ids=torch.full((2, 7), modality)).loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)


def visible(experts: int, **options) -> list[list[int]]:
    return ModalityGroupsRouter(4, experts, **options).visible.int().tolist()


def test_groups():
    assert visible(8) == [[1, 1, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert visible(5) == [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert visible(4, own=2) == [[1, 1, 0, 0], [0, 0, 1, 1]]  # nothing in common
    assert visible(3, own=0) == [[1, 1, 1]] * 2
    three = visible(4, num_modalities=3, own=1)
    assert three == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert visible(6, common=False) == [[1] * 3 + [0] * 3, [0] * 3 + [1] * 3]
    with pytest.raises(ValueError, match="common=False leaves 1 of 5 experts to nobody"):
        visible(5, common=False)
    with pytest.raises(ValueError, match="own=3 for 2 modalities doesn't fit into 4 experts"):
        visible(4, own=3)
    with pytest.raises(ValueError, match="num_modalities=1 must be at least 2"):
        visible(4, num_modalities=1)


@pytest.mark.parametrize(
    ("name", "options"), [("moiie", {}), ("moma", {"common": False}), ("pill", {"own": 1})]
)
def test_tokens_have_exactly_nothing_of_the_others_experts(name, options, tiny_model, tiny_batch):
    config = MoloraConfig.from_method(name)
    model = get_peft_model(tiny_model("llama"), config).eval()
    batch = tiny_batch("llama")
    modality = batch["input_ids"] % 2
    with torch.no_grad(), molora.observe(model) as records:
        model(**batch, modality_ids=modality)
    allowed = torch.tensor(visible(config.num_experts, **options)).bool()[modality.flatten()]
    for routing in records.values():
        assert (routing.weights[~allowed] == 0).all() and (routing.probs[~allowed] == 0).all()


def test_ids_that_are_missing_or_unknown(tiny_model, tiny_batch):
    model = get_peft_model(tiny_model("llama"), MoloraConfig.from_method("smar"))
    batch = tiny_batch("llama")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        model(**batch)
    message = str(caught.value)
    for part in ("'modality_bias' needs", "column 'modality_ids'", "molora.RoutingLabelCollator",
                 "mm_token_type_ids", "molora.routing_labels"):  # fmt: skip
        assert part in message
    with pytest.raises(ValueError, match="no modality 2: this router knows 2"):
        model(**batch, modality_ids=torch.full((2, 7), 2))
    with pytest.raises(ValueError, match="high=1.0 must be 0 <= low <= high"):
        MoloraConfig(losses={"modality_kl": {"coefficient": 1, "low": 2.0, "high": 1.0}})


def test_a_loss_asks_too(tiny_model, tiny_batch):
    config = MoloraConfig(num_experts=4, target_modules=["q_proj"], losses={"modality_kl": 0.1})
    model = get_peft_model(tiny_model("llama"), config).train()
    with pytest.raises(ValueError, match="the loss 'modality_kl' needs the modality of each token"):
        model(**tiny_batch("llama"))
    config.losses = {"modality_balancing": 0.1}
    with pytest.raises(ValueError, match="needs router='modality_groups'"):
        get_peft_model(tiny_model("llama"), config)
