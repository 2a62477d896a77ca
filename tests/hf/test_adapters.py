"""Adapters of peft on packed layers: the values and the training of the same adapters on the dequantized model."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import mpq_kernels as mpq
from mpq_kernels.nn.float8 import Float8Linear
from tests.made.checkpoints import tiny_model
from tests.made.twins import dequantized_twin

peft = pytest.importorskip("peft", reason="only a program that uses adapters needs it")
from mpq_kernels.hf import register  # noqa: E402

IDS = torch.arange(3, 19)[None]
LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def lora(targets, **words):
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **({"r": 4} | words))


def ia3(targets, **words):
    feedforward = {"down_proj"} if targets == "all-linear" else {"down_proj"} & set(targets)
    return peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward, **words)


def oft(targets, **words):
    return peft.OFTConfig(task_type="CAUSAL_LM", target_modules=targets, oft_block_size=16, **words)


METHODS = {"lora": lora, "ia3": ia3, "oft": oft}
# Plain, members of fused weights (q/k/v; gate/up), both.
TARGETS = {"plain": ["o_proj", "down_proj"], "fused": ["q_proj", "v_proj", "up_proj"], "all": "all-linear"}


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    """(dense, packed) directories of a Qwen2, which has biases; q/k/v and gate/up fused; a packed head."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_model("qwen2", root / "dense", tied=False)
    fuse = [
        {"name": "qkv_proj", "members": ["q_proj", "k_proj", "v_proj"]},
        {"name": "gate_up_proj", "members": ["gate_proj", "up_proj"]},
    ]
    plan = {"version": 1, "default": {"bits": 4, "group_size": -1}, "fuse": fuse}
    mpq.pack(root / "dense", root / "packed", mpq.Plan.model_validate(plan), quantizer="rtn")
    return SimpleNamespace(dense=root / "dense", packed=root / "packed")


@pytest.fixture(scope="module")
def twin(dirs):
    """The dense model with the dequantized weights; each test takes a copy."""
    return dequantized_twin(mpq.load(dirs.packed), dirs.dense)


def fill(model):
    """Random values in every adapter, which would otherwise start as one that changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(parameter + noise if "ia3" in name else noise)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(got, wanted, within=1e-6):
    return (got - wanted).norm() <= within * wanted.norm()  # fp32 sums in another order


def adapted(model):
    """Last parts of the names of the modules that have an adapter."""
    marks = (".lora_A.", ".ia3_l.", ".oft_R.")
    names = [name.partition(mark)[0] for name, _ in model.named_parameters() for mark in marks if mark in name]
    return sorted({name.rpartition(".")[2] for name in names})


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_values_are_those_of_the_dequantized_model(dirs, twin, method, targets):
    models = [
        peft.get_peft_model(base, METHODS[method](TARGETS[targets])).eval()
        for base in (mpq.load(dirs.packed), copy.deepcopy(twin))
    ]
    for model in models:
        fill(model)
    packed, dense = models
    assert adapted(packed) == adapted(dense) == sorted(LINEARS if targets == "all" else TARGETS[targets])
    assert packed.state_dict().keys() >= {name for name in dense.state_dict() if "default" in name}
    assert close(logits(packed), logits(dense))
    assert not close(logits(packed), logits(twin), within=1e-3), "the adapter does something"


@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_the_dequantized_model(dirs, twin, method):
    curves = []
    for base in (mpq.load(dirs.packed), copy.deepcopy(twin)):
        torch.manual_seed(2)
        model = peft.get_peft_model(base, METHODS[method]("all-linear")).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "default" not in name}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses = []
        for _ in range(20):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the base model is frozen"
    packed, dense = curves
    assert packed[-1] < packed[0] - 0.05
    assert packed == pytest.approx(dense, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_saved_loaded_switched_and_disabled(dirs, twin, method, tmp_path):
    model = peft.get_peft_model(mpq.load(dirs.packed), METHODS[method](["q_proj", "o_proj"]), "one").eval()
    fill(model)
    model.save_pretrained(tmp_path)
    one, plain = logits(model), logits(mpq.load(dirs.packed))
    again = peft.PeftModel.from_pretrained(mpq.load(dirs.packed), tmp_path / "one", "one").eval()
    assert torch.equal(logits(again), one)
    on_dense = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path / "one").eval()
    assert close(one, logits(on_dense)), "an adapter belongs to the dense model as well"
    with again.disable_adapter():
        assert torch.equal(logits(again), plain)
    again.add_adapter("two", METHODS[method](["q_proj", "down_proj"]))
    again.set_adapter("two")
    assert torch.equal(logits(again), plain), "a new adapter changes nothing"
    again.set_adapter("one")
    assert torch.equal(logits(again), one)
    again.delete_adapter("two")
    assert torch.equal(logits(again), one)
    assert torch.equal(logits(again.unload()), plain)


def test_the_adapters_of_transformers(dirs, tmp_path, monkeypatch):
    # transformers may ask for a newer peft than the installed one, for things that are not used here.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18")
    model = AutoModelForCausalLM.from_pretrained(dirs.packed)
    plain = logits(model)
    model.add_adapter(lora("all-linear"), "mine")
    assert adapted(model) == LINEARS
    fill(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(dirs.packed)
    again.load_adapter(tmp_path, "mine")
    assert torch.equal(logits(again), wanted) and not torch.equal(wanted, plain)
    again.disable_adapters()
    assert torch.equal(logits(again), plain)
    again.enable_adapters()
    assert torch.equal(logits(again), wanted)


def test_the_trainer_of_transformers(dirs, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, num_train_epochs=4, learning_rate=0.01, logging_steps=4,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    base = mpq.load(dirs.packed)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(base, arguments, train_dataset=rows)
    trainer = Trainer(peft.get_peft_model(base, lora("all-linear")), arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_refused_in_words_and_before_anything_is_merged(dirs, method):
    base = mpq.load(dirs.packed)
    base.model.extra = torch.nn.Linear(64, 64)
    model = peft.get_peft_model(base, METHODS[method](["extra", "o_proj", "q_proj"])).eval()
    fill(model)
    before, weight = logits(model), base.model.extra.weight.clone()
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge, model.base_model.merge_and_unload):
        with pytest.raises(mpq.UnsupportedError, match="merge it into the dense model and pack that"):
            merge()
    assert torch.equal(base.model.extra.weight, weight) and torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("targets", "words", "reason"),
    [
        (["qkv_proj"], {}, "name the projections that it holds instead: q_proj, k_proj, v_proj"),
        (["o_proj"], {"use_dora": True}, "DoRA needs the norms"),
        (["o_proj"], {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' starts from the values"),
        (["q_proj"], {"init_lora_weights": "olora"}, "init_lora_weights='olora' starts from the values"),
    ],
)
def test_what_cannot_work_is_refused(dirs, targets, words, reason):
    with pytest.raises(mpq.UnsupportedError, match=reason):
        peft.get_peft_model(mpq.load(dirs.packed), lora(targets, **words))
    model = peft.get_peft_model(mpq.load(dirs.packed), lora(["q_proj", "o_proj"]))
    with pytest.raises(mpq.UnsupportedError, match=reason):
        model.add_adapter("second", lora(targets, **words))


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "qwen2_moe"])
def mixture(request, tmp_path_factory):
    """(dense, packed) directories of mixtures; gpt-oss has transposed and interleaved experts with biases."""
    root = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, root / "dense", tied=False)
    mpq.pack(root / "dense", root / "packed", mpq.Plan.uniform(root / "dense", bits=4, group_size=16), quantizer="rtn")
    return SimpleNamespace(dense=root / "dense", packed=root / "packed")


EXPERTS = {
    "gate and up": {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []},
    "all of both": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("targets", EXPERTS)
def test_lora_of_experts(mixture, targets, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **EXPERTS[targets])
    base = mpq.load(mixture.packed)
    twin = dequantized_twin(base, mixture.dense)
    plain = logits(base)
    packed, dense = (peft.get_peft_model(m, copy.deepcopy(config)).eval() for m in (base, twin))
    for model in (packed, dense):
        fill(model)
    trained, others = (
        {name for name, parameter in model.named_parameters() if parameter.requires_grad} for model in (dense, packed)
    )
    wanted = logits(packed)
    assert not close(wanted, plain, within=1e-3)
    if others == trained:
        assert close(wanted, logits(dense))
        gradients = []
        for model in (packed, dense):
            model(input_ids=IDS, labels=IDS).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert all(close(g, gradients[1][name], within=1e-5) for name, g in gradients[0].items())
    else:  # peft leaves them out: it takes their names for those of the experts
        assert all(".shared_expert." in name for name in others - trained) and trained < others
    packed.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(mpq.load(mixture.packed), tmp_path).eval()
    assert torch.equal(logits(again), wanted)
    with again.disable_adapter():
        assert torch.equal(logits(again), plain)
    with pytest.raises(mpq.UnsupportedError, match="merge it into the dense model and pack that"):
        again.merge_and_unload()
    assert torch.equal(logits(again.unload()), plain)


def test_several_adapters_of_experts(mixture):
    config = peft.LoraConfig(r=4, **EXPERTS["all of both"])
    base = mpq.load(mixture.packed)
    dense = peft.get_peft_model(dequantized_twin(base, mixture.dense), copy.deepcopy(config), "one")
    packed = peft.get_peft_model(base, copy.deepcopy(config), "one")
    for model in (packed, dense):
        model.add_adapter("two", copy.deepcopy(config))
        for name in ("two", "one"):
            model.base_model.set_adapter(name)
            fill(model.eval())
    seen = []
    for active in ("one", "two", ["one", "two"]):
        for model in (packed, dense):
            model.base_model.set_adapter(active)
        assert close(logits(packed), logits(dense)), active
        seen.append(logits(packed))
    assert not close(seen[2], seen[0], within=1e-4)


def test_other_adapters_of_experts_are_refused(mixture):
    for targets in (["gate_up"], ["experts"]):
        for method in METHODS.values():
            with pytest.raises(mpq.UnsupportedError, match="its rows belong to different experts"):
                peft.get_peft_model(mpq.load(mixture.packed), method(targets))


def test_a_packed_embedding_takes_none_and_the_head_that_is_tied_to_it_does(tmp_path):
    tiny_model("qwen2", tmp_path / "dense", tied=True)
    plan = mpq.Plan.uniform(tmp_path / "dense", bits=4, group_size=-1, embeddings=4)
    mpq.pack(tmp_path / "dense", tmp_path / "packed", plan, quantizer="rtn")
    with pytest.raises(mpq.UnsupportedError, match="its rows are looked up by number"):
        peft.get_peft_model(mpq.load(tmp_path / "packed"), lora(["embed_tokens"]))
    base = mpq.load(tmp_path / "packed")
    plain, head = logits(base), base.lm_head
    model = peft.get_peft_model(base, lora(["lm_head"])).eval()
    fill(model)
    assert model.base_model.model.lm_head.get_base_layer() is head
    assert not close(logits(model), plain, within=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert "lm_head" not in adapted(peft.get_peft_model(mpq.load(tmp_path / "packed"), lora("all-linear")))


def test_float8_linears_take_adapters(tmp_path):
    tiny_model("qwen2", tmp_path / "dense", tied=False)
    rules = {"re:.*_proj": {"bits": 8, "dtype": "float8_e4m3fn"}}
    mpq.pack(tmp_path / "dense", tmp_path / "packed", mpq.Plan.from_dict({"version": 1, "modules": rules}))
    base = mpq.load(tmp_path / "packed")
    assert isinstance(base.model.layers[0].self_attn.q_proj, Float8Linear)
    plain = logits(base)
    model = peft.get_peft_model(base, lora("all-linear")).eval()
    fill(model)
    assert adapted(model) == LINEARS and not close(logits(model), plain, within=1e-3)
    with pytest.raises(mpq.UnsupportedError, match="merge it into the dense model and pack that"):
        model.merge_and_unload()


def test_a_weight_that_the_model_reads_itself_takes_no_adapter(dirs):
    model = mpq.load(dirs.packed)
    model.model.layers[0].mlp.down_proj.weight_is_read = True
    with pytest.raises(mpq.UnsupportedError, match="does not call it, so that the adapter would do nothing"):
        peft.get_peft_model(model, lora(["down_proj"]))


@pytest.mark.parametrize("method", METHODS)
def test_16_bit_models_train_in_their_dtype(dirs, method):
    model = peft.prepare_model_for_kbit_training(mpq.load(dirs.packed, dtype=torch.bfloat16))
    model = peft.get_peft_model(model, METHODS[method]("all-linear"))
    o_proj = model.base_model.model.model.layers[0].self_attn.o_proj
    assert o_proj.weight.is_floating_point(), "some models cast their activations to the dtype of a weight"
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.isfinite().all() for g in gradients)


ORDERS = {
    "peft first": "import peft, mpq_kernels",
    "after looking for it": "import mpq_kernels, importlib.util; importlib.util.find_spec('peft'); import peft",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_peft_knows_packed_layers_whoever_is_imported_first(order):
    test = "print(peft.PEFT_TYPE_TO_TUNER_MAPPING['OFT'].__module__, peft.__loader__.get_filename('peft'))"
    done = subprocess.run([sys.executable, "-c", f"{ORDERS[order]}; {test}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mpq_kernels.hf.adapters", peft.__file__]


def test_a_peft_that_lacks_something_is_left_alone(monkeypatch):
    monkeypatch.setitem(register.TARGETS, "peft", "no_such_file")
    with pytest.warns(UserWarning, match="peft will not take packed layers: .*no_such_file"):
        register._register("peft")
