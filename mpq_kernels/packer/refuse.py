"""What packing refuses before any work is done: what would be of no use, or could not be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..checkpoint.config import PackingConfig
from ..dense.checkpoint import DenseCheckpoint
from ..dense.conversions import Table
from ..dense.model import CONFIG_FILE, build_meta_model, check_bytes
from ..errors import CheckpointError
from ..files.safetensors import Spec
from ..nn.loading import UNUSED, check_whole, trial_report

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


def check_loads(source: DenseCheckpoint, packing: PackingConfig, tensors: Mapping[str, Spec]) -> tuple[str, ...]:
    """Load the packed model as `load` will, without values. Returns stored tensors that the model does not use.

    Those too of which transformers says nothing, such as the prediction layers of DeepSeek-V3. tensors: all that will
    be written. Raises CheckpointError for what `load` would refuse.
    """
    _check_beside(source, packing, tensors)
    model = build_meta_model(source.path, source.dtype)
    table = Table(model)
    report = trial_report(model, packing, tensors, source.dtype)
    check_bytes(source.path / CONFIG_FILE, model, sum(tensor.entry.nbytes for tensor in source.tensors.values()))
    check_whole(source.path, report)
    unused = {name for name in source.tensors if table.target(name)[0] not in table.state}
    return tuple(sorted(unused | (set(report[UNUSED]) & source.tensors.keys())))


def _check_beside(source: DenseCheckpoint, packing: PackingConfig, tensors: Iterable[str]) -> None:
    """Raise CheckpointError for a tensor beside a packed weight that the model lacks: it may belong to the weight."""
    own = {name for module in packing.modules.values() for name in module.tensor_names}
    own.update(*(module.tensor_names for module in packing.floats.values()))
    places = {place: module.name for module in packing.modules.values() for place in (module.name, *module.replaced())}
    places |= {name: name for name in packing.floats}
    for name in tensors:
        owner, _, last = name.rpartition(".")
        if name not in own and (owner in places or last == "qweight"):
            raise CheckpointError(
                f"{source.tensors.get(name, name)}: {owner} is to be packed, and the model that config.json describes "
                f"has no {last} there. Keep {owner} as it is (bits=16), or remove the tensor from the checkpoint"
            )
