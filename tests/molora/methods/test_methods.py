"""Every method's record is complete, and its configuration builds."""

import json
import re
from collections import Counter

import pytest

from molora import MoloraConfig, available_methods
from molora.allocation import allocate
from molora.methods import METHODS
from molora.sites import Site

NAMES = available_methods()
every_method = pytest.mark.parametrize("name", NAMES)
NO_PAPER = "% no paper"  # a baseline
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bibtex(text: str) -> tuple[str, str, dict[str, str]]:
    """Kind, key and fields of one BibTeX entry; fails unless the whole text is exactly that."""
    head = re.match(r"@(\w+)\{([\w:.-]+),\s*", text)
    assert head is not None, text
    position, fields = head.end(), {}
    while text[position] != "}":
        field = re.compile(r"(\w+)\s*=\s*\{").match(text, position)
        assert field is not None, text[position:]
        depth, end = 1, field.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        fields[field[1].lower()] = text[field.end() : end - 1]
        rest = re.compile(r"\s*,?\s*").match(text, end)
        assert rest is not None
        position = rest.end()
    assert text[position + 1 :].strip() == ""
    return head[1].lower(), head[2], fields


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", re.sub(r"[{}\\]", "", text).lower())


@every_method
def test_the_record_is_complete(name):
    method = METHODS.get(name)
    assert method.name == name and re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name)
    for field in ("title", "summary", "equations", "sources", "deviations", "citation"):
        text = getattr(method, field)
        assert text.strip() and text == text.lstrip(), field
    assert "\n" not in method.summary and len(method.summary) <= 90
    assert "\n" not in method.title
    assert method.version >= 1
    assert method.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}|\d{4}\.\d{4}", method.arxiv)


@every_method
def test_the_equations_give_the_output_within_a_line(name):
    equations = METHODS.get(name).equations
    assert re.search(r"\by = ", equations), equations
    assert all(len(line) <= 100 for line in equations.splitlines())


@every_method
def test_the_citation_is_one_bibtex_entry_for_the_paper(name):
    method = METHODS.get(name)
    if method.citation == NO_PAPER:
        assert method.arxiv is None
        return
    kind, _, fields = bibtex(method.citation)
    assert kind in {"article", "inproceedings", "misc"}
    assert {"title", "author", "year"} <= set(fields)
    assert words(fields["title"]) == words(method.title)
    assert re.fullmatch(r"20\d\d", fields["year"])
    if method.arxiv is not None:
        # a paper is published in the year of its preprint or up to three years later
        assert 0 <= int(fields["year"]) - (2000 + int(method.arxiv[:2])) <= 3
        cited = re.findall(r"\d{4}\.\d{4,5}", method.citation)
        assert set(cited) <= {method.arxiv}


def test_papers_have_one_key_each_and_keys_one_paper():
    citations = {name: METHODS.get(name).citation for name in NAMES}
    entries = {name: bibtex(text) for name, text in citations.items() if text != NO_PAPER}
    titles: dict[str, set[tuple[str, ...]]] = {}
    for _, key, fields in entries.values():
        titles.setdefault(key, set()).add(tuple(words(fields["title"])))
    assert {key: found for key, found in titles.items() if len(found) > 1} == {}
    keys = Counter(tuple(next(iter(found))) for found in titles.values())
    assert [title for title, count in keys.items() if count > 1] == []


@every_method
def test_the_defaults_build_a_configuration_that_says_where_it_is_from(name):
    method = METHODS.get(name)
    config = MoloraConfig.from_method(name)
    assert (config.method, config.method_version) == (name, method.version)
    assert config.target_modules
    for field, value in method.defaults.items():
        built = getattr(config, field)
        assert built == (set(value) if isinstance(built, set) else value), field


@every_method
def test_the_defaults_survive_json(name, tmp_path):
    config = MoloraConfig.from_method(name)
    config.save_pretrained(str(tmp_path))
    assert MoloraConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()
    json.dumps(dict(METHODS.get(name).defaults))


@every_method
def test_any_field_can_be_overridden(name):
    overridden = MoloraConfig.from_method(name, lora_alpha=3.5, target_modules=["a"], method=None)
    assert (overridden.lora_alpha, overridden.target_modules) == (3.5, {"a"})
    assert overridden.method is None


@every_method
@pytest.mark.parametrize("layers", [4, 12, 30, 32])
def test_the_defaults_fit_models_of_many_depths(name, layers):
    config = MoloraConfig.from_method(name)
    asked = config.target_modules
    targets = LLAMA if asked == "all-linear" else [n for n in LLAMA if n in (asked or ())]
    if isinstance(asked, str) and asked != "all-linear":
        targets = [n for n in LLAMA if re.search(asked, f"model.layers.0.mlp.{n}")] or LLAMA
    sites = [Site(f"model.layers.{i}.m.{n}", i, 64, 64) for i in range(layers) for n in targets]
    allocations = allocate(config, sites, layers)
    assert len(allocations) == layers * len(targets) > 0
    assert all(allocation.total_rank > 0 for allocation in allocations.values())


def test_mola_has_the_papers_experts_at_32_layers():
    sites = [Site(f"model.layers.{i}.mlp.up_proj", i, 8, 8) for i in range(32)]
    allocations = allocate(MoloraConfig.from_method("mola"), sites, 32)
    experts = [len(allocation.ranks) for allocation in allocations.values()]
    assert experts == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert {allocation.scaling[0] for allocation in allocations.values()} == {2.0}


def test_the_names_are_sorted_and_the_anchors_among_them():
    assert sorted(NAMES) == NAMES
    assert {"lora", "mola", "loramoe"} <= set(NAMES)
