"""`mpq generate --image --audio`: what the model's own processor makes of files, and what is refused."""

import math
import shutil
import sys
import wave

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Idefics3Processor, WhisperFeatureExtractor, WhisperProcessor

import mpq_kernels as mpq
from mpq_kernels.cli.media import media_inputs, open_processor, pictures, read_sound
from mpq_kernels.errors import MPQError
from tests.made.multimodal import tiny_multimodal

Image = pytest.importorskip("PIL.Image", reason="only a program that reads images needs it")
SPECIAL = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
TEMPLATE = (
    "{% for message in messages %}User:{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} Assistant:"
)
RATE = 16000


@pytest.fixture(scope="module")
def models(space, tmp_path_factory):
    """An Idefics 3 and a Whisper, packed, each with its processor; a picture and a sound."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    root = tmp_path_factory.mktemp("media")
    tokenizer = AutoTokenizer.from_pretrained(space / "dense")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    edge = {"longest_edge": 32}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    ids = {"vocab_size": len(tokenizer), "image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    tiny_multimodal("idefics3", root / "dense", **ids)
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE).save_pretrained(root / "dense")
    plan = mpq.Plan.uniform(root / "dense", bits=6, group_size=32)
    mpq.pack(root / "dense", root / "sees", plan, quantizer="rtn")

    tiny_multimodal("whisper", root / "dense2", vocab_size=len(tokenizer), max_source_positions=50)
    sounds = WhisperFeatureExtractor(feature_size=8, chunk_length=1, sampling_rate=RATE)
    WhisperProcessor(sounds, tokenizer).save_pretrained(root / "dense2")
    plan = mpq.Plan.uniform(root / "dense2", bits=6, group_size=32)
    mpq.pack(root / "dense2", root / "hears", plan, quantizer="rtn")

    Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(root / "picture.png")
    tone = [round(9000 * math.sin(0.3 * i)) for i in range(RATE // 2)]
    write_wave(root / "tone.wav", np.array(tone, np.int16).tobytes())
    return root


def write_wave(path, data, width=2, rate=RATE, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)


WORDS = ["--max-new-tokens", 5]


def test_a_picture(run, models):
    words = ["generate", models / "sees", "--prompt", "What is it?", "--image", models / "picture.png", *WORDS]
    data = run(*words, "--json").json()
    processor, model = AutoProcessor.from_pretrained(models / "sees"), mpq.load(models / "sees")
    with Image.open(models / "picture.png") as image:
        inputs = processor(text="User:<image>What is it? Assistant:", images=[image], return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert data["token_ids"] == found[0, inputs["input_ids"].shape[1] :].tolist()
    streamed = run(*words)
    assert streamed.out.strip() == processor.decode(data["token_ids"], skip_special_tokens=True).strip()
    dense = [*words[:1], models / "dense", *words[2:]]
    assert run(*dense, "--json").json()["new_tokens"] == data["new_tokens"]


def test_a_processor_without_a_template_gets_its_marks(run, models, tmp_path):
    path = shutil.copytree(models / "sees", tmp_path / "plain")
    (path / "chat_template.jinja").unlink()
    words = ["--image", models / "picture.png", *WORDS, "--json"]
    marked = run("generate", path, "--prompt", "<image>What is it?", *words).json()
    assert run("generate", path, "--prompt", "What is it?", *words).json()["token_ids"] == marked["token_ids"]


def test_a_sound(run, models):
    data = run("generate", models / "hears", "--audio", models / "tone.wav", *WORDS, "--json").json()
    processor, model = AutoProcessor.from_pretrained(models / "hears"), mpq.load(models / "hears")
    samples = read_sound(models / "tone.wav", RATE)
    inputs = processor(audio=[samples], sampling_rate=RATE, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert data["token_ids"] == found[0, 1:].tolist()


@pytest.mark.parametrize(("width", "kind", "peak"), [(1, np.uint8, 2**7), (2, np.int16, 2**15), (4, np.int32, 2**31)])
def test_samples_of_wav_files(width, kind, peak, tmp_path):
    wanted = torch.linspace(-1, 0.99, 50).numpy()
    stored = (wanted * peak + (128 if width == 1 else 0)).astype(kind)
    stereo = np.stack([stored, stored], 1)
    write_wave(tmp_path / "a.wav", stereo.tobytes(), width, channels=2)
    found = read_sound(tmp_path / "a.wav", RATE)
    assert found.dtype == np.float32 and np.abs(found - wanted).max() <= 1 / peak + 1e-6  # one step of the file


def test_refusals(run, models, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    write_wave(tmp_path / "slow.wav", b"\0\0" * 99, rate=8000)
    picture, tone = ["--image", models / "picture.png"], ["--audio", models / "tone.wav"]
    cases = [
        ("sees", ["--image", tmp_path / "text.png"], "is no image that pillow can read"),
        ("sees", ["--image", tmp_path / "none.png"], "none.png"),
        ("sees", tone, "takes no sound; leave --audio out"),
        ("hears", picture, "takes no images; leave --image out"),
        ("hears", ["--audio", tmp_path / "slow.wav"], "ffmpeg"),
        ("hears", ["--audio", tmp_path / "none.wav"], "none.wav"),
        ("sees", [], "the prompt is empty"),
    ]
    for model, words, reason in cases:
        refused = run("generate", models / model, *words, code=1)
        assert reason in refused.err and refused.out == "" and len(refused.err.splitlines()) == 1
    refused = run("generate", "packed", "--prompt", "x", *picture, code=1)
    assert "reads text alone" in refused.err or "no processor" in refused.err
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in run("generate", models / "sees", "--prompt", "x", *picture, code=1).err


def test_a_model_that_generates_nothing(run, tmp_path, space):
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=2048, num_hidden_layers=1, num_labels=3, **sizes)
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(space / "dense" / name, tmp_path / "model")
    refused = run("generate", tmp_path / "model", "--prompt", "x", code=1)
    assert "a Qwen2ForSequenceClassification generates no text" in refused.err


def test_a_sound_that_cannot_be_read(tmp_path):
    with pytest.raises(MPQError, match="cannot be read"):
        read_sound(tmp_path / "none.wav", RATE)


def test_calibration_on_pictures(run, models, tmp_path):
    (tmp_path / "pictures").mkdir()
    for index, colour in enumerate(("red", "green")):
        Image.new("RGB", (30, 40), colour).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    tower = "model.vision_model.encoder.layers.0.mlp.fc1"
    plan = mpq.Plan.from_dict({"version": 1, "modules": {tower: {"bits": 3, "group_size": 32}}})
    plan.to_file(tmp_path / "plan.json")
    words = ["--plan", tmp_path / "plan.json", "--quantizer", "gptq", "--json", "--quiet"]
    seen = ["--calibration-images", tmp_path / "pictures", "--calibration-prompt", "What is it?"]
    run("pack", models / "dense", tmp_path / "a", *words, *seen)
    processor, samples = open_processor(models / "dense"), []
    for path in pictures(tmp_path / "pictures"):
        samples.append(dict(media_inputs(processor, "What is it?", [path], [])))
    mpq.pack(models / "dense", tmp_path / "b", plan, quantizer="gptq", calibration=mpq.Calibration(samples=samples))
    mpq.pack(models / "dense", tmp_path / "c", plan, quantizer="rtn")
    packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert packed[0] == packed[1] != packed[2]
    (tmp_path / "empty").mkdir()
    nothing = run("pack", models / "dense", tmp_path / "d", *words, "--calibration-images", tmp_path / "empty", code=1)
    assert "holds no file with one of the endings" in nothing.err and not (tmp_path / "d").exists()
    assert "either --calibration or --calibration-images" in run.misuse(
        "pack", models / "dense", "d", *words, *seen, "--calibration", "text.txt"
    )
