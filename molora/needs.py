"""What routers, gates and losses need of a batch beside hidden states, and how to supply it."""

from collections.abc import Iterable

from .routing import SiteInput

COLUMN = (
    "give the dataset a column {name!r} and wrap the trainer's data collator in "
    "molora.RoutingLabelCollator (with remove_unused_columns=False), pass {argument} {shape} to "
    "the model's forward, or, around generate or the train() of a trainer that gives the model "
    "tokens alone (TRL's GRPO, RLOO, ORPO), use molora.routing_labels(model, {name}=...), where "
    "one row serves all"
)
HELP = {
    "task_ids": "the task of each sequence: "
    + COLUMN.format(name="task_ids", argument="routing_task_ids", shape="(batch,)"),
    "modality_ids": "the modality of each token, 0 for text: "
    + COLUMN.format(name="modality_ids", argument="modality_ids", shape="(batch, sequence)")
    + "; models that take mm_token_type_ids give it by themselves",
    "expert_prior": "how much each expert suits each sequence: "
    + COLUMN.format(name="expert_prior", argument="expert_prior", shape="(batch, experts)"),
    "request_embeddings": "an embedding of each sequence: "
    + COLUMN.format(
        name="request_embeddings", argument="request_embeddings", shape="(batch, size)"
    ),
    "input_ids": "the tokens' ids: call the model with input_ids instead of inputs_embeds",
    "embeddings": "the tokens' embeddings: call the model with input_ids or inputs_embeds, and let "
    "it have get_input_embeddings()",
    "prompt": "the sequences of the batch",
    "positions": "each token's place in its sequence",
}
# Every pass of a base model has them, if need be by an error that says what is unclear.
EVERYWHERE = ("prompt", "positions")


def require(needs: Iterable[str], inputs: SiteInput, who: str) -> None:
    """Raise what is missing, and how to supply it.

    Args:
        needs: of the keys of `HELP`.
        inputs: of a site.
        who: whose needs they are, such as "the router 'task'".

    Raises:
        ValueError: the batch doesn't bring it.
        RuntimeError: the site runs outside of the base model's forward, where nothing is known.
    """
    tokens = inputs.tokens
    for name in needs:
        if tokens is None:
            raise RuntimeError(
                f"{who} needs {HELP[name]}; but the site {inputs.site!r} runs outside of the base "
                "model's forward, where nothing is known of its tokens; call the model as a whole."
            )
        if name == "input_ids":
            missing = tokens.input_ids is None
        elif name == "embeddings":
            missing = not tokens.given.has_embeddings
        else:
            missing = name not in EVERYWHERE and tokens.given.label(name) is None
        if missing:
            raise ValueError(f"{who} needs {HELP[name]}.")
