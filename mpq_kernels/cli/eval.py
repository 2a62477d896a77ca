"""`mpq eval`: lm-evaluation-harness on a packed or dense model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .models import open_model
from .options import ActivationsOption, AnyDir, BackendOption, DeviceOption, DtypeOption, JsonFlag, QuietFlag
from .output import note, print_json

INSTALL = "pip install 'lm_eval>=0.4.9'"


def command(
    directory: AnyDir,
    tasks: Annotated[str, typer.Option(help="Tasks of the harness, with commas between them.")],
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; without it, the task's own number.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task; without it, all of them.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, as YAML.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    device: DeviceOption = "cpu",
    backend: BackendOption = None,
    activations: ActivationsOption = "exact",
    dtype: DtypeOption = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Run tasks of lm-evaluation-harness, which downloads their questions, on a packed or dense model."""
    from ..errors import MPQError, UnsupportedError

    if find_spec("lm_eval") is None:
        raise UnsupportedError(f"mpq eval needs lm-evaluation-harness: {INSTALL}")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("--tasks names none")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise MPQError(f"--tasks {', '.join(unknown)}: not known to lm-evaluation-harness {lm_eval.__version__}")
    model, tokenizer = open_model(directory, device, dtype, backend, activations)
    note(f"{directory}: {', '.join(names)} by lm-evaluation-harness {lm_eval.__version__}", quiet)
    found: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=names,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
    )
    if as_json:
        print_json({"harness": lm_eval.__version__, "results": found["results"], "samples": found["n-samples"]})
    else:
        print(make_table(found))
