"""What packing refuses before any work is done: a model of which it would pack too little to be of use."""

from __future__ import annotations

from ..dense.checkpoint import DenseCheckpoint
from ..errors import CheckpointError

MIN_KNOWN = 0.5  # share of the matrices, embeddings and head not counted, that must be known as those of linears
MAX_NAMED = 5  # classes in a message


def check_recognised(source: DenseCheckpoint) -> None:
    """Raise CheckpointError when most of a model's matrices are not known as linears, whatever the plan says of them.

    Without this such a model would be copied as it is, and called packed.
    """
    model = source.model_map
    known = sum(spec.out_features * spec.in_features for spec in model.linears if not spec.is_head)
    total = known + sum(matrix.elements for matrix in model.others)
    if known and known >= MIN_KNOWN * total:
        return
    classes: dict[str, list[int]] = {}
    owners = {matrix.kind: matrix.owner for matrix in reversed(model.others)}
    for matrix in model.others:
        classes.setdefault(matrix.kind, []).append(matrix.elements)
    largest = sorted(classes.items(), key=lambda item: -sum(item[1]))
    named = [f"{kind} (such as {owners[kind]}; {sum(sizes):,} weights)" for kind, sizes in largest[:MAX_NAMED]]
    reasons = sorted({part.reason for part in model.left.values()})
    raise CheckpointError(
        f"{source.path}: {known:,} of the {total:,} weights between embedding and head belong to linears that are "
        f"known as such; the others to {', '.join(named) or 'nothing'}{''.join(f'; {why}' for why in reasons)}. "
        "allow_dense=True (--allow-dense) packs what can be packed"
    )
