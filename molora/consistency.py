"""Agreement of two passes over one batch (THOR, arXiv 2110.04260)."""

from torch import Tensor


def consistency_loss(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over positions of (KL(p || q) + KL(q || p)) / 2, p and q the softmax of two logits.

    For gates that draw in training, such as "stochastic": two passes over one batch use different
    experts, and their predictions should agree. It is the training loop's part, since a layer sees
    one pass only:

        one, two = model(**batch), model(**batch)
        agree = molora.consistency_loss(one.logits, two.logits, batch["labels"] != -100)
        (one.loss + two.loss + coefficient * agree).backward()

    Auxiliary losses of the configuration are attached to each of the two passes.

    Args:
        first: (..., V) logits of one pass.
        second: (..., V) logits of the other.
        mask: (...) bool, True for positions that count; None counts all.

    Returns:
        () in fp32 (fp64 for fp64 logits), 0 where no position counts; both passes get a gradient.

    Raises:
        ValueError: the shapes don't fit.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"the logits of two passes over one batch have the same shape, not "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    if mask is not None and mask.shape != first.shape[:-1]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; logits of shape {tuple(first.shape)} need "
            f"{tuple(first.shape[:-1])}."
        )
    if first.element_size() < 4:
        first, second = first.float(), second.float()
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
    if mask is None:
        return divergence.mean()
    return divergence.masked_fill(~mask.bool(), 0.0).sum() / mask.sum().clamp(min=1)
