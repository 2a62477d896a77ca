"""LoRA of peft on packed layers: it trains, it is saved and loaded, and it is not merged."""

import pytest
import torch

import mpq_kernels as mpq
from tests.made.checkpoints import tiny_model

peft = pytest.importorskip("peft", reason="only a program that trains adapters needs it")
from mpq_kernels.hf.lora import with_packed_layers  # noqa: E402

IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory):
    """A packed Llama with fused q/k/v and a packed head."""
    root = tmp_path_factory.mktemp("lora")
    tiny_model("llama", root / "source", tied=False)
    fuse = [{"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]}]
    plan = {"version": 1, "default": {"bits": 4, "group_size": -1}, "fuse": fuse}
    mpq.pack(root / "source", root / "packed", mpq.Plan.model_validate(plan), quantizer="rtn")
    return root / "packed"


def adapted(path, targets, **words):
    model = mpq.load(path)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **words)
    return peft.get_peft_model(model, with_packed_layers(config, model))


def adapters(model):
    """Last parts of the names of the modules that have an adapter."""
    names = [name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name]
    return sorted({name.rpartition(".")[2] for name in names})


def test_all_linear_means_the_packed_ones_but_the_head(packed_dir):
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert adapters(adapted(packed_dir, "all-linear")) == names


def test_training_lowers_the_loss_and_leaves_packed_tensors(packed_dir, tmp_path):
    model = adapted(packed_dir, ["q_proj", "v_proj", "o_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path)
    base = mpq.load(packed_dir)
    config = with_packed_layers(peft.LoraConfig.from_pretrained(tmp_path), base)
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=config)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
        with again.disable_adapter():
            assert torch.equal(again(input_ids=IDS).logits, mpq.load(packed_dir)(input_ids=IDS).logits)


def test_merging_is_refused_in_words(packed_dir):
    model = adapted(packed_dir, ["o_proj", "q_proj"])
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(mpq.UnsupportedError, match="merge it into the dense model and pack that"):
            merge()


@pytest.mark.parametrize(
    ("targets", "words", "reason"),
    [
        (["qkv_proj"], {}, "name the projections that it holds instead: q_proj, k_proj, v_proj"),
        (["o_proj"], {"use_dora": True}, "DoRA needs the norms"),
    ],
)
def test_what_cannot_work_is_refused(packed_dir, targets, words, reason):
    with pytest.raises(mpq.UnsupportedError, match=reason):
        adapted(packed_dir, targets, **words)
