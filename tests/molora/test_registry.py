"""Open registries."""

from dataclasses import dataclass

import pytest

from molora.registry import Registry, options_of, unknown_name_message


class Shape:
    def __init__(self, size: int, *, color: str = "red", edge: float = 1.0) -> None:
        self.size, self.color, self.edge = size, color, float(edge)


@pytest.fixture
def shapes() -> Registry:
    registry: Registry = Registry("shape")
    registry.register("square")(Shape)
    return registry


def test_what_is_registered_is_found_and_unchanged(shapes):
    @shapes.register("circle")
    class Circle(Shape):
        pass

    assert shapes.get("circle") is Circle
    assert shapes.names() == ["circle", "square"]


def test_a_name_is_taken_only_once(shapes):
    with pytest.raises(ValueError, match=r"shape 'square' is already registered as .*Shape"):
        shapes.register("square")(type("Other", (), {}))
    assert shapes.get("square") is Shape


def test_a_class_defined_anew_replaces_itself(shapes):
    # the same notebook cell, run twice
    anew = type("Shape", (), {"__module__": Shape.__module__, "__qualname__": "Shape"})
    shapes.register("square")(anew)
    assert shapes.get("square") is anew


def test_equal_records_may_be_registered_twice_and_others_not():
    @dataclass(frozen=True)
    class Record:
        text: str

    records: Registry = Registry("record")
    records.register("a")(Record("x"))
    records.register("a")(Record("x"))
    with pytest.raises(ValueError, match="record 'a' is already registered"):
        records.register("a")(Record("y"))


@pytest.mark.parametrize("name", ["sqare", "", None, 3, ["square"]], ids=str)
def test_an_unknown_name_lists_the_known_ones(shapes, name):
    with pytest.raises(ValueError) as caught:
        shapes.get(name)
    assert f"unknown shape {name!r}; known: square." in str(caught.value)


def test_a_near_name_is_suggested_and_a_far_one_not():
    known = ["top_p", "top_k", "dense"]
    assert unknown_name_message("gate", "topk", known) == (
        "unknown gate 'topk'; known: dense, top_k, top_p. Did you mean 'top_k'?"
    )
    assert unknown_name_message("gate", "zzz", known).endswith("known: dense, top_k, top_p.")


def test_options_are_the_keyword_only_parameters(shapes):
    assert list(options_of(Shape)) == ["color", "edge"]
    built = shapes.build("square", {"color": "blue"}, size=3)
    assert (built.size, built.color) == (3, "blue")


@pytest.mark.parametrize("option", ["colour", "size", "self"])
def test_an_unknown_option_lists_what_the_class_takes(shapes, option):
    with pytest.raises(ValueError) as caught:
        shapes.build("square", {option: 1}, size=3)
    assert f"shape 'square' has no option {option!r}; it takes: color, edge." in str(caught.value)


def test_a_missing_option_is_named():
    shapes: Registry = Registry("shape")

    @shapes.register("polygon")
    class Polygon:
        def __init__(self, size: int, *, corners: int, color: str = "red") -> None:
            self.corners = corners

    with pytest.raises(ValueError) as caught:
        shapes.build("polygon", {"color": "blue"}, size=3)
    assert "shape 'polygon' needs the option 'corners'; it takes: color, corners." in str(
        caught.value
    )
    assert shapes.build("polygon", {"corners": 4}, size=3).corners == 4


def test_an_option_of_the_wrong_type_is_a_value_error_that_shows_it(shapes):
    with pytest.raises(ValueError) as caught:
        shapes.build("square", {"edge": [1]}, size=3)
    assert str(caught.value) == "shape 'square': option edge=[1] must be a finite number."


def test_a_type_that_no_annotation_says_is_a_value_error_too():
    shapes: Registry = Registry("shape")

    @shapes.register("polygon")
    class Polygon:
        def __init__(self, *, corners=3) -> None:
            self.corners = corners + 1

    with pytest.raises(ValueError) as caught:
        shapes.build("polygon", {"corners": [1]})
    assert "shape 'polygon' refuses the options {'corners': [1]}" in str(caught.value)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_mistake_in_the_library_stays_the_error_it_is(shapes):
    with pytest.raises(TypeError):
        shapes.build("square", {}, length=3)
