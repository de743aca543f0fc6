"""Routers and gates in words that an engine can implement without this library.

The logits are z = (W x + b) / temperature, in fp32, of the tensor that enters the module. A gate is
then a record of five decisions, taken in this order:

    scores          "softmax" or "sigmoid" of all E logits
    select          "all"; "top_k", the site's `top_k` largest logits (scores + selection_bias,
                    where the file of the router holds one); "top_p", from the largest score down
                    until their sum reaches p, the expert that crosses it included; "threshold",
                    scores of at least `threshold`, which null makes 1 / E, and then the largest
                    score is always in
    ties            of equal values the expert with the smallest index is taken first
    renormalize     divide the selected scores by their sum; a token without any keeps zeros
    scale           factor on the weights
"""

from collections.abc import Callable
from typing import Any, cast

from ..gates import GATES, Gate
from ..gates.dense_training import DenseTraining
from ..gates.sigmoid import Sigmoid
from ..gates.threshold import Threshold
from ..gates.top_p import TopP
from ..registry import unknown_name_message
from ..routers import ROUTERS, LinearRouter, Router

Record = dict[str, Any]


def _top_k(**changes: Any) -> Record:
    return {"scores": "softmax", "select": "top_k", "renormalize": False, **changes}


def _sigmoid(gate: Gate) -> Record:
    return _top_k(scores="sigmoid", renormalize=True, scale=cast(Sigmoid, gate).scale)


def _top_p(gate: Gate) -> Record:
    own = cast(TopP, gate)
    return {"scores": "softmax", "select": "top_p", "p": own.p, "renormalize": own.renormalize}


def _threshold(gate: Gate) -> Record:
    own = cast(Threshold, gate)
    if own.most is not None:
        raise ValueError(
            f"gate option most={own.most} of 'threshold' can't be said in a bundle; leave it out."
        )
    chosen = {"threshold": own.threshold, "renormalize": own.renormalize}
    return {"scores": "softmax", "select": "threshold", **chosen}


def _dense_training(gate: Gate) -> Record:
    """What it does at inference."""
    return _top_k(renormalize=cast(DenseTraining, gate).renormalize)


RECORDS: dict[str, Callable[[Gate], Record]] = {
    "dense": lambda gate: {"scores": "softmax", "select": "all", "renormalize": False},
    "dense_training": _dense_training,
    "sigmoid": _sigmoid,
    "switch": lambda gate: _top_k(),
    "threshold": _threshold,
    "top_k": lambda gate: _top_k(renormalize=True),
    "top_k_unnormalized": lambda gate: _top_k(),
    "top_p": _top_p,
}


def gate_record(gate: Gate) -> Record:
    """The gate's decisions.

    Raises:
        ValueError: the gate is none of those that the record can describe.
    """
    name = GATES.name_of(type(gate))
    if name not in RECORDS:
        raise ValueError(unknown_name_message("gate for a bundle", name, RECORDS))
    return {"name": name, "scale": 1.0, "ties": "smallest index", **RECORDS[name](gate)}


def router_record(router: Router) -> Record:
    """The router's settings; its tensors go into a file.

    Raises:
        ValueError: it isn't linear in the module's input.
    """
    if type(router) is not LinearRouter:
        name = ROUTERS.name_of(type(router))
        raise ValueError(unknown_name_message("router for a bundle", name, ["linear"]))
    return {"name": "linear", "temperature": router.temperature, "compute_dtype": "float32"}
