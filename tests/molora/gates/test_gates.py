"""Every gate against its formula, written out token by token, and what all gates have in common."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from molora.gates import GATES, Gate
from molora.gates.base import FEW, normalize, select_top_k, softmax_top_k
from molora.routing import Routing, SiteInput

# Quarters give many ties, and no probability comes near a threshold without meeting it.
ROWS = st.integers(2, 6).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=experts, max_size=experts),
        min_size=1,
        max_size=5,
    )
)
CASES = [
    ("dense", {}),
    ("top_k", {}),
    ("top_k_unnormalized", {}),
    ("switch", {}),
    ("sigmoid", {}),
    ("top_p", {}),
    ("top_p", {"p": 0.43, "renormalize": True}),
    ("threshold", {}),
    ("threshold", {"threshold": 0.31}),
    ("threshold", {"threshold": 0.71, "renormalize": False}),
    ("threshold", {"threshold": 0.15, "most": 2}),
]
every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[" ".join([name, *map(str, o.values())]) for name, o in CASES]
)
SELECT_K = ["top_k", "top_k_unnormalized", "sigmoid"]


def build(name: str, experts: int, top_k: int | None = None, **options: object) -> Gate:
    gate = GATES.get(name)
    if top_k is None:
        top_k = gate.default_top_k
    return GATES.build(name, options, num_experts=experts, top_k=top_k, in_features=3)


def route(gate: Gate, logits: Tensor) -> Routing:
    return gate(logits, SiteInput(hidden=torch.zeros(len(logits), 3)))


def doubles(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(z - max(row)) for z in row]
    return [power / sum(powers) for power in powers]


def first(row: list[float], k: int) -> list[int]:
    """The k largest, the first of equal ones first."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def kept(values: list[float], chosen: list[int], renormalize: bool) -> list[float]:
    total = sum(values[e] for e in chosen) if renormalize and chosen else 1.0
    return [values[e] / total if e in chosen else 0.0 for e in range(len(values))]


def formula(name: str, row: list[float], k: int = 2, **options: object) -> list[float]:
    """The routing weights of one token, as the papers write them."""
    probs = softmax(row)
    if name == "dense":
        return probs
    if name == "top_k":
        return kept(probs, first(row, k), renormalize=True)
    if name == "top_k_unnormalized":
        return kept(probs, first(row, k), renormalize=False)
    if name == "switch":
        return kept(probs, first(row, 1), renormalize=False)
    if name == "sigmoid":
        return kept([1 / (1 + math.exp(-z)) for z in row], first(row, k), renormalize=True)
    if name == "threshold":
        least = options.get("threshold")
        if least is None:
            chosen = [e for e, p in enumerate(probs) if p >= 1 / len(row) - 1e-12]
        else:
            chosen = [e for e, p in enumerate(probs) if p >= least]
        if "most" in options:
            chosen = [e for e in chosen if e in first(row, options["most"])]
        return kept(probs, chosen, options.get("renormalize", True))
    assert name == "top_p"
    chosen, mass = [], 0.0
    for e in first(row, len(row)):
        if mass < options.get("p", 0.8):
            chosen.append(e)
            mass += probs[e]
    return kept(probs, chosen, options.get("renormalize", False))


def near_p(row: list[float], p: float) -> bool:
    """Whether a partial sum of the sorted probabilities is p but for rounding."""
    ordered = sorted(softmax(row), reverse=True)
    return any(abs(sum(ordered[:n]) - p) < 1e-9 for n in range(len(ordered) + 1))


@every_case
@given(rows=ROWS)
def test_weights_are_the_formula(name, options, rows):
    if name == "top_p":
        assume(not any(near_p(row, options.get("p", 0.8)) for row in rows))
    routing = route(build(name, len(rows[0]), **options), doubles(rows))
    expected = doubles([formula(name, row, **options) for row in rows])
    torch.testing.assert_close(routing.weights, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(routing.weights == 0, expected == 0)


@pytest.mark.parametrize("name", SELECT_K)
@given(rows=ROWS, data=st.data())
def test_every_k_from_one_to_all(name, rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    routing = route(build(name, len(rows[0]), top_k=k), doubles(rows))
    expected = doubles([formula(name, row, k=k) for row in rows])
    torch.testing.assert_close(routing.weights, expected, rtol=1e-12, atol=1e-14)
    assert routing.selected.sum(-1).tolist() == [k] * len(rows)


@every_case
@given(rows=ROWS)
def test_the_record_holds_raw_logits_and_a_distribution(name, options, rows):
    logits = doubles(rows)
    routing = route(build(name, len(rows[0]), **options), logits)
    assert torch.equal(routing.logits, logits)
    assert routing.weights.shape == routing.probs.shape == logits.shape
    assert (routing.probs > 0).all()
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(len(rows), dtype=torch.float64))
    if name != "sigmoid":
        expected = doubles([softmax(row) for row in rows])
        torch.testing.assert_close(routing.probs, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), [
    ("dense", {}), ("top_k", {}), ("sigmoid", {}), ("top_p", {"renormalize": True}),
    ("threshold", {}),
])  # fmt: skip
@given(rows=ROWS)
def test_renormalised_weights_sum_to_one(name, options, rows):
    routing = route(build(name, len(rows[0]), **options), doubles(rows))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(len(rows), dtype=torch.float64))


@every_case
@given(st.data())
def test_permuting_the_experts_permutes_the_weights(name, options, data):
    # distinct logits: of equal ones the order decides, as it should
    row = data.draw(st.lists(st.integers(-12, 12), min_size=2, max_size=6, unique=True))
    order = data.draw(st.permutations(range(len(row))))
    logits = doubles([row]) / 4
    gate = build(name, len(row), **options)
    direct = route(gate, logits).weights[:, order]
    permuted = route(gate, logits[:, order]).weights
    torch.testing.assert_close(permuted, direct, rtol=1e-12, atol=1e-14)


@every_case
@given(rows=ROWS)
def test_a_token_is_routed_alike_alone_and_in_a_batch(name, options, rows):
    logits = torch.tensor(rows)
    gate = build(name, len(rows[0]), **options)
    together = route(gate, logits).weights
    for i in range(len(rows)):
        assert torch.equal(route(gate, logits[i : i + 1]).weights[0], together[i])


@pytest.mark.parametrize("name", [*SELECT_K, "switch"])
def test_of_equal_logits_the_first_experts_win(name):
    experts = 40  # beyond the size up to which an unstable sort happens to be stable
    gate = build(name, experts)
    selected = route(gate, torch.zeros(3, experts)).selected
    k = gate.top_k
    assert selected.nonzero()[:, 1].tolist() == list(range(k)) * 3


def test_top_p_adds_equal_experts_in_their_order():
    weights = route(build("top_p", 4, p=0.4), torch.zeros(1, 4)).weights
    assert weights.tolist() == [[0.25, 0.25, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("p", "experts"), [(0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.999, 3), (1.0, 3)]
)
def test_top_p_stops_with_the_expert_that_reaches_p(p, experts):
    logits = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    selected = route(build("top_p", 3, p=p), logits).selected
    assert selected.tolist() == [[experts > 1, True, experts > 2]]


@given(rows=ROWS, p=st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)))
def test_top_p_grows_with_p_and_always_takes_the_likeliest(rows, p):
    logits = doubles(rows)
    few, many = (
        route(build("top_p", len(rows[0]), p=bound), logits).selected for bound in sorted(p)
    )
    assert not (few & ~many).any()
    assert few[torch.arange(len(rows)), logits.argmax(-1)].all()


def test_top_p_of_one_uses_every_expert():
    logits = torch.tensor([[0.0, -3.0, 5.0, 1.0]])
    assert route(build("top_p", 4, p=1.0), logits).selected.all()


def test_a_threshold_may_leave_a_token_without_experts():
    gate = build("threshold", 4, threshold=0.4)
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]], requires_grad=True)
    weights = route(gate, logits).weights
    assert weights[0].tolist() == [0.0] * 4
    assert weights[1].tolist() == [1.0, 0.0, 0.0, 0.0]
    weights.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("experts", range(2, 12))
def test_the_default_threshold_takes_all_of_equal_experts(experts):
    logits = torch.full((1, experts), 0.3)
    assert route(build("threshold", experts), logits).selected.all()


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_a_renormalised_threshold_that_one_expert_alone_can_reach_is_refused(threshold):
    # the weight would be constantly 1, and the router without a gradient, as with K = 1
    with pytest.raises(ValueError) as caught:
        build("threshold", 4, threshold=threshold)
    assert f"threshold={threshold} lets at most one expert" in str(caught.value)
    assert "renormalize" in str(caught.value)
    build("threshold", 4, threshold=threshold, renormalize=False)


@every_case
def test_one_expert_has_weight_one_whatever_the_logits_if_the_gate_says_so(name, options):
    gate = build(name, 1, top_k=1 if GATES.get(name).takes_top_k else None, **options)
    logits = torch.tensor([[-40.0], [0.0], [3.0]], requires_grad=True)
    weights = route(gate, logits).weights
    weights.sum().backward()
    has_an_effect = bool(logits.grad.any()) or weights.tolist() != [[1.0]] * 3
    assert gate.constant_for_one_expert is not has_an_effect


@every_case
def test_the_gradient_is_that_of_the_formula(name, options):
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    gate = build(name, 5, **options)
    upstream = torch.randn(6, 5, dtype=torch.float64)
    (route(gate, logits).weights * upstream).sum().backward()
    step = 1e-6
    for t in range(6):
        for e in range(5):
            total = 0.0
            for sign in (1, -1):
                row = logits[t].tolist()
                row[e] += sign * step
                weights = formula(name, row, **options)
                pairs = zip(weights, upstream[t].tolist(), strict=True)
                total += sign * sum(w * u for w, u in pairs)
            assert logits.grad[t, e].item() == pytest.approx(total / (2 * step), abs=1e-8)


@every_case
def test_extreme_logits_stay_finite(name, options):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [300.0, 299.0, -300.0]])
    routing = route(build(name, 3, **options), logits.requires_grad_())
    routing.weights.sum().backward()
    assert torch.isfinite(routing.weights).all() and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_sigmoid_weights_still_sum_to_one_where_scores_underflow(shift):
    weights = route(build("sigmoid", 3), torch.tensor([[0.0, 1.0, -1.0]]) + shift).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(1))
    likely, second = weights[0, 1].item(), weights[0, 0].item()
    expected = math.e if shift < 0 else 1.0  # sigmoid(z) is e^z far below 0, and 1 far above
    assert likely / second == pytest.approx(expected, rel=1e-4)


@every_case
def test_weights_are_fp32_for_fp32_logits_under_autocast(name, options):
    gate = build(name, 4, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = route(gate, torch.randn(3, 4))
    assert routing.weights.dtype == routing.probs.dtype == torch.float32


@every_case
def test_no_tokens(name, options):
    assert route(build(name, 4, **options), torch.zeros(0, 4)).weights.shape == (0, 4)


@every_case
def test_sparse_means_that_some_weights_are_zero(name, options):
    weights = route(build(name, 4, **options), torch.tensor([[3.0, 2.0, -4.0, -5.0]])).weights
    assert bool((weights == 0).any()) is GATES.get(name).sparse


def test_the_cases_cover_the_gates_of_this_package():
    ours = {n for n in GATES.names() if GATES.get(n).__module__.startswith("molora.gates.")}
    assert {
        "dense",
        "top_k",
        "top_k_unnormalized",
        "switch",
        "sigmoid",
        "top_p",
        "threshold",
    } <= ours
    assert {name for name, _ in CASES} <= ours


@pytest.mark.parametrize("gradients", [True, False])
@given(rows=ROWS, data=st.data())
def test_select_top_k_takes_k_and_the_first_of_equals(gradients, rows, data):
    k = data.draw(st.integers(1, len(rows[0])))
    with torch.set_grad_enabled(gradients):  # without, few tokens aren't sorted
        selected = select_top_k(doubles(rows), k)
    assert [r.nonzero().flatten().tolist() for r in selected] == [
        sorted(first(row, k)) for row in rows
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, -0.0])
@given(rows=ROWS, data=st.data())
def test_few_tokens_get_the_bits_that_a_sort_gives(odd, dtype, rows, data):
    logits = torch.tensor(rows, dtype=dtype)
    k = data.draw(st.integers(1, logits.shape[1]))
    at = data.draw(st.lists(st.integers(0, logits.numel() - 1), max_size=3))
    logits.view(-1)[at] = odd
    with torch.no_grad():
        few = softmax_top_k(logits, k)
    torch.testing.assert_close(few, softmax_top_k(logits, k), rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_few_tokens_are_sorted_only_for_a_tie(monkeypatch):
    sorts = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda *a, **kw: sorts.append(a) or sort(*a, **kw))
    logits = torch.randn(FEW + 1, 4).argsort(-1).float()
    softmax_top_k(logits[:FEW], 2)
    assert not sorts
    softmax_top_k(logits, 2)
    assert len(sorts) == 1
    logits[3] = 1.0
    softmax_top_k(logits[:FEW], 2)
    assert len(sorts) == 2


def test_normalize_leaves_zeros():
    weights = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert normalize(weights).tolist() == [[0.25, 0.75], [0.0, 0.0]]


SPEAKING = sorted(
    name for name in GATES.names() if GATES.get(name).weights_of_token is not Gate.weights_of_token
)


@pytest.mark.parametrize("name", SPEAKING)
@given(rows=ROWS, data=st.data())
def test_one_token_of_a_generation_gets_what_it_gets_among_others(name, rows, data):
    experts = len(rows[0])
    k = GATES.get(name).fixed_top_k or data.draw(st.integers(1, experts))
    gate = build(name, experts, k).eval()
    among = route(gate, doubles(rows)).weights
    for row, expected in zip(rows, among.tolist(), strict=True):
        found = gate.weights_of_token(row)
        assert found is not None
        weights = [dict(found).get(e, 0.0) for e in range(experts)]
        assert weights == pytest.approx(expected, rel=1e-12)
        assert [e for e, _ in sorted(found)] == [e for e, w in enumerate(expected) if w]


@pytest.mark.parametrize("name", SPEAKING)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_left_to_the_gate(name, wrong):
    gate = build(name, 3, GATES.get(name).fixed_top_k or 2).eval()
    assert gate.weights_of_token([0.0, wrong, 1.0]) is None


def test_there_are_gates_that_speak_of_one_token():
    assert {"top_k", "top_k_unnormalized", "switch", "gshard"} <= set(SPEAKING)
