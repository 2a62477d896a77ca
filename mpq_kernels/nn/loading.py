"""What transformers says of loading a packed model: when it is loaded, and before it is packed, on a trial.

A tensor that the model does not use is no fault: packing keeps it and its report names it, loading passes over it, as
transformers does with the dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.config import PackingConfig
from ..dense.model import no_progress_bar
from ..errors import CheckpointError
from .install import install_modules

UNUSED = "unexpected_keys"


def check_whole(path: Path, report: Mapping[str, Iterable[Any]]) -> None:
    """Raise CheckpointError for what transformers' report of a loading says is missing, misshapen or cannot be made."""
    problems = {key: sorted(map(str, value)) for key, value in report.items() if value and key != UNUSED}
    if problems:
        raise CheckpointError(
            f"{path}: transformers did not load the model whole: "
            + "; ".join(f"{key}: {', '.join(value[:5])}" for key, value in problems.items())
        )


def trial_report(
    model: Any, packing: PackingConfig, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], dtype: torch.dtype
) -> dict[str, Iterable[Any]]:
    """The report of loading tensors of these names, dtypes and shapes into a model on the meta device.

    Puts empty packed modules into the model first.

    This is how transformers loads a model, from its renaming of tensors to its tying of weights; no values are needed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    from .naming import own_names, packed_names, spared_transforms

    names = packed_names({**packing.modules, **packing.floats})
    own = own_names(model, tensors, names)
    install_modules(model, packing, dtype)
    state = {name: torch.empty(shape, dtype=kind, device="meta") for name, (kind, shape) in tensors.items()}
    mapping: Any = spared_transforms(get_model_conversion_mapping(model), names, own)
    # No module has the second name; with a "disk" among the devices transformers takes no threads, which cannot be had
    # any more when the main thread of the program has ended.
    devices: Any = {"": "meta", "no module": "disk"}
    config = LoadStateDictConfig(
        dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping, device_map=devices
    )
    with no_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, state, config)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    return {
        # What cannot be converted without values would count as missing, and may be there when there are values.
        "missing_keys": () if info.conversion_errors else info.missing_keys,
        UNUSED: info.unexpected_keys,
        "mismatched_keys": info.mismatched_keys,
        "error_msgs": info.error_msgs,
    }
