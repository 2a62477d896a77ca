"""lm-evaluation-harness on a packed model with a packed, tied head: its figures are those of the dequantized model.

make test-lm-eval        installs the harness in an environment of its own and runs this file
"""

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import mpq_kernels as mpq
from mpq_kernels.cli import main
from mpq_kernels.evaluate.perplexity import perplexity
from tests.made.twins import dequantized_twin

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("make test-lm-eval installs the harness in an environment of its own", allow_module_level=True)
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the libraries are imported
import lm_eval  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
ROLLING = """\
task: made_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
CHOICE = """\
task: made_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the packed and the dequantized model, tasks and their texts."""
    root = tmp_path_factory.mktemp("lm_eval")
    plan = mpq.Plan.uniform(EXAMPLES / "gutenberg-6m", bits=4, group_size=64, lm_head=4)
    mpq.pack(EXAMPLES / "gutenberg-6m", root / "packed", plan, quantizer="rtn")
    model = mpq.load(root / "packed", dtype=torch.float32)
    assert isinstance(model.lm_head, mpq.MixedLinear) and model.config.tie_word_embeddings
    dense = dequantized_twin(model, EXAMPLES / "gutenberg-6m").float()
    dense.config.tie_word_embeddings = False  # its head holds what the packed one dequantizes to
    dense.save_pretrained(root / "dense")
    AutoTokenizer.from_pretrained(root / "packed").save_pretrained(root / "dense")
    text = (EXAMPLES / "gutenberg_val.txt").read_text(encoding="utf-8")
    parts = [part.strip() for part in text[:40_000].split("\n\n") if len(part) > 200]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts[:12]))
    rows = [
        {"text": part[:120], "endings": [part[120:160], other[120:160]]}
        for part, other in zip(parts[:20], parts[20:40], strict=True)
    ]
    (root / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("text", ROLLING), ("choice", CHOICE)):
        (root / f"{name}.yaml").write_text(task.format(folder=root))
    return root


def evaluate(model, folder):
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    names = ["made_text", "made_choice"]
    found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=tasks, bootstrap_iters=0)["results"]
    return {(task, key): value for task in names for key, value in found[task].items() if isinstance(value, float)}


def harness_model(path):
    return HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=4)


def test_figures_are_those_of_the_dequantized_model(made):
    dense = evaluate(harness_model(str(made / "dense")), made)
    packed = evaluate(harness_model(str(made / "packed")), made)
    assert packed.keys() == dense.keys() and len(packed) >= 5
    assert packed == pytest.approx(dense, rel=1e-5)
    assert dense["made_text", "word_perplexity,none"] > 1
    # A model that is loaded already, too; the harness calls tie_weights() on both.
    loaded = mpq.load(made / "packed", dtype=torch.float32)
    wrapped = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(made / "packed"), batch_size=4)
    assert evaluate(wrapped, made) == pytest.approx(packed, rel=1e-6)


def test_log_likelihoods_are_those_of_mpq_ppl(made):
    """A text that fits one window: the harness puts the end-of-text token before it."""
    model, tokenizer = mpq.load(made / "packed", dtype=torch.float32), AutoTokenizer.from_pretrained(made / "packed")
    text = json.loads((made / "texts.jsonl").read_text().splitlines()[0])["text"]
    whole = tokenizer.decode([tokenizer.eos_token_id]) + text
    tokens = len(tokenizer(whole, add_special_tokens=False)["input_ids"])
    ours = perplexity(model, tokenizer, whole, window=tokens)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    request = lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (text,), 0)
    (theirs,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    assert math.isclose(-theirs / ours.predicted, ours.nll, rel_tol=1e-6)


def test_the_command_gives_the_same_figures(made, capsys):
    words = ["eval", str(made / "packed"), "--tasks", "made_text,made_choice", "--include-path", str(made)]
    assert main([*words, "--dtype", "float32", "--batch-size", "4", "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = {
        (task, key): value
        for task, values in data["results"].items()
        for key, value in values.items()
        if isinstance(value, float) and "stderr" not in key
    }
    assert found == pytest.approx(evaluate(harness_model(str(made / "packed")), made), rel=1e-6)
    assert main([*words, "--limit", "2", "--quiet"]) == 0
    assert "|made_choice" in capsys.readouterr().out
    assert main(["eval", str(made / "packed"), "--tasks", "no_such_task"]) == 1
    assert "no_such_task: not known to lm-evaluation-harness" in capsys.readouterr().err
