"""`mpq kld`: divergence from the original, measured or saved."""


def test_kld_of_packed_models(run):
    words = ["--original", "dense", "--text", "text.txt", "--max-tokens", "512", "--json"]
    same = run("kld", "dense", *words).json()
    packed = run("kld", "packed", *words, "--save", "ref.safetensors").json()
    mixed = run("kld", "mixed", "--original", "ref.safetensors", "--json").json()
    assert same["kl"] < 1e-6 and same["top1"] > 0.99
    assert 1e-6 < packed["kl"] < mixed["kl"] and packed["predicted"] == 510
    assert "percentiles of KL" in run("kld", "packed", "--original", "ref.safetensors").out
    assert "--text FILE" in run("kld", "packed", "--original", "dense", code=1).err
    held = ["--original", "ref.safetensors", "--text", "text.txt"]
    assert "holds its own tokens" in run("kld", "packed", *held, code=1).err


def test_int8_activations_are_a_little_further_away(run):
    words = ["kld", "packed", "--original", "dense", "--text", "text.txt", "--max-tokens", "512", "--json"]
    exact, rounded = run(*words).json(), run(*words, "--activations", "int8").json()
    assert exact["kl"] != rounded["kl"] and abs(exact["kl"] - rounded["kl"]) < 0.5 * exact["kl"]
    dense = run("kld", "dense", *words[2:], "--activations", "int8", code=1)
    assert "is for packed ones" in dense.err
