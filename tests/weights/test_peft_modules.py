"""PEFT adapters that change more than the projections: embedding, output projection, norms, vocabulary."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llama_jax as lj
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.weights.adapters import load_adapter
from llama_jax.weights.module_expressions import UnsupportedExpression, compile_expression
from tests import tiny
from tests.random_models import random_model
from tests.tokenizer import vocabularies
from tests.weights.adapters import tensors, write

ROWS, WIDTH, SCALE = tiny.CONFIG.vocab_size, 16, 6 / 4
PREFIX = "base_model.model"
EMBED, HEAD, NORM = f"{PREFIX}.model.embed_tokens", f"{PREFIX}.lm_head", f"{PREFIX}.model.norm"
PROJECTION = tensors(["self_attn.q_proj"])


def random(*shape, seed=7):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The same model with tied and with separate embeddings: its path, its embedding, its output matrix."""
    folder = tmp_path_factory.mktemp("bases")
    made = {}
    for tied in (False, True):
        config, params = random_model(5, tiny.CONFIG.replace(tie_word_embeddings=tied))
        path = lj.save(config, params, folder / f"tied {tied}")
        table = np.asarray(params["embed"]["embedding"])
        made[tied] = path, table, table if tied else np.asarray(params["lm_head"]["kernel"]).T
    return made


A, B = random(4, ROWS), random(WIDTH, 4, seed=8)  # of an embedding
HEAD_A, HEAD_B = random(4, WIDTH, seed=9), random(ROWS, 4, seed=10)
TABLE, OTHER = random(ROWS, WIDTH), random(ROWS, WIDTH, seed=8)
LARGER = random(ROWS + 5, WIDTH)
EMBED_LORA = {f"{EMBED}.lora_embedding_A": A, f"{EMBED}.lora_embedding_B": B}
HEAD_LORA = {f"{HEAD}.lora_A.weight": HEAD_A, f"{HEAD}.lora_B.weight": HEAD_B}
DELTA, HEAD_DELTA = SCALE * (B @ A).T, SCALE * HEAD_B @ HEAD_A
IDS = [3, 1, 7]
TOKENS = random(3, WIDTH)


def with_rows(table):
    changed = table.copy()
    changed[IDS] = TOKENS
    return changed


# The fields, the tensors, and the expected tables from the base's embedding and output projection.
CASES = {
    "LoRA on the embedding": ({}, EMBED_LORA, lambda e, h: (e + DELTA, h)),
    "LoRA on the head": ({}, HEAD_LORA, lambda e, h: (e, h + HEAD_DELTA)),
    "LoRA on both": ({}, EMBED_LORA | HEAD_LORA, lambda e, h: (e + DELTA, h + HEAD_DELTA)),
    "both saved": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {f"{EMBED}.weight": TABLE, f"{HEAD}.weight": OTHER},
        lambda e, h: (TABLE, OTHER),
    ),
    "the head saved": (
        {"modules_to_save": ["lm_head"]},
        {f"{HEAD}.weight": OTHER},
        lambda e, h: (e, OTHER),
    ),
    "the embedding saved": (
        {"modules_to_save": ["embed_tokens"]},
        {f"{EMBED}.weight": TABLE},
        lambda e, h: (TABLE, h),
    ),
    "a larger vocabulary": (
        {},
        {f"{EMBED}.weight": LARGER, f"{HEAD}.weight": LARGER},
        lambda e, h: (LARGER, LARGER),
    ),
    "a larger vocabulary, LoRA on the head": (
        {},
        {f"{EMBED}.weight": LARGER, f"{HEAD}.base_layer.weight": LARGER}
        | {f"{HEAD}.lora_A.weight": HEAD_A, f"{HEAD}.lora_B.weight": random(ROWS + 5, 4, seed=10)},
        lambda e, h: (LARGER, LARGER + SCALE * random(ROWS + 5, 4, seed=10) @ HEAD_A),
    ),
    "trained tokens of both": (
        {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
        {f"{EMBED}.token_adapter.trainable_tokens_delta": TOKENS}
        | {f"{HEAD}.token_adapter.trainable_tokens_delta": TOKENS},
        lambda e, h: (with_rows(e), with_rows(h)),
    ),
    "trained tokens of the head": (
        {"trainable_token_indices": {"lm_head": IDS}},
        {f"{HEAD}.token_adapter.trainable_tokens_delta": TOKENS},
        lambda e, h: (e, with_rows(h)),
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_embedding_and_head(case, tied, bases, tmp_path):
    fields, stored, expected = CASES[case]
    path, *tables = bases[tied]
    adapter = write(tmp_path / "a", PROJECTION | stored, target_modules=["q_proj"], **fields)
    config, params = lj.load_params(path, adapter=adapter)
    table, head = expected(*tables)
    np.testing.assert_allclose(params["embed"]["embedding"], table, rtol=1e-5, atol=1e-5)
    found = params["embed"]["embedding"].T if config.tie_word_embeddings else params["lm_head"]["kernel"]
    np.testing.assert_allclose(found.T, head, rtol=1e-5, atol=1e-5)
    assert config.vocab_size == len(table)
    assert config.tie_word_embeddings == (tied and np.array_equal(table, head))
    with pytest.raises(CheckpointError, match=r"also changes .*, so that it can only be merged: llama_jax\."):
        load_adapter(adapter)


def test_trained_tokens_are_those_of_a_tied_head(bases, tmp_path):
    for number, (fields, name) in enumerate(
        (
            ({"peft_type": "TRAINABLE_TOKENS", "token_indices": IDS}, "trainable_tokens_delta"),
            ({"trainable_token_indices": IDS}, "token_adapter.trainable_tokens_delta"),
        )
    ):
        adapter = write(tmp_path / str(number), {f"{EMBED}.{name}": TOKENS}, **fields)
        config, params = lj.load_params(bases[True][0], adapter=adapter)
        assert config.tie_word_embeddings
        np.testing.assert_array_equal(params["embed"]["embedding"], with_rows(bases[True][1]))


def test_a_copy_of_a_tied_embedding_that_stays_tied(bases, tmp_path):
    stored = PROJECTION | {f"{EMBED}.weight": TABLE}
    fields = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "target_modules": ["q_proj"]}
    config, params = lj.load_params(bases[True][0], adapter=write(tmp_path / "a", stored, **fields))
    assert config.tie_word_embeddings
    np.testing.assert_array_equal(params["embed"]["embedding"], TABLE)


def test_norms_and_whole_projections_are_replaced(bases, tmp_path):
    at = f"{PREFIX}.model.layers.1"
    whole = {f"{NORM}.weight": random(16), f"{at}.input_layernorm.weight": random(16, seed=8)}
    whole[f"{at}.mlp.up_proj.weight"] = random(24, 16)
    saved = ["model.norm", "input_layernorm", "up_proj"]
    adapter = write(tmp_path / "a", PROJECTION | whole, target_modules=["q_proj"], modules_to_save=saved)
    params = lj.load_params(bases[False][0], adapter=adapter)[1]
    layers = params["layers"]
    np.testing.assert_array_equal(params["final_norm"]["scale"], whole[f"{NORM}.weight"])
    np.testing.assert_array_equal(layers["attention_norm"]["scale"][1], whole[f"{at}.input_layernorm.weight"])
    np.testing.assert_array_equal(layers["feed_forward"]["w_up"][1].T, whole[f"{at}.mlp.up_proj.weight"])


def test_magnitudes_of_an_embedding_are_of_its_columns(bases, tmp_path):
    q_norms = {
        f"{PREFIX}.model.layers.{i}.self_attn.q_proj.lora_magnitude_vector": random(16) for i in (0, 1)
    }
    stored = EMBED_LORA | {f"{EMBED}.lora_magnitude_vector": random(WIDTH)}
    adapter = write(tmp_path / "a", PROJECTION | q_norms | stored, target_modules=["q_proj"], use_dora=True)
    path, table, _ = bases[False]
    merged = table + DELTA
    expected = merged * random(WIDTH) / np.linalg.norm(merged, axis=0)
    found = lj.load_params(path, adapter=adapter)[1]["embed"]["embedding"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initializations_take_a_part_of_the_base(init, bases, tmp_path):
    at = f"{PREFIX}.model.layers.0.self_attn.q_proj"
    fields = {"target_modules": ["layers.0.self_attn.q_proj"], "init_lora_weights": init}
    stored = {name: array for name, array in PROJECTION.items() if ".layers.0." in name}
    adapter = write(tmp_path / "a", stored, **fields)
    path = bases[False][0]
    weight = load_file(path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    if init == "pissa":
        u, s, v = np.linalg.svd(weight)
        taken = u[:, :4] @ np.diag(s[:4]) @ v[:4]
    else:
        q, r = np.linalg.qr(weight)
        taken = SCALE * q[:, :4] @ r[:4]
    expected = weight - taken + SCALE * stored[f"{at}.lora_B.weight"] @ stored[f"{at}.lora_A.weight"]
    found = lj.save(*lj.load_params(path, adapter=adapter), tmp_path / "out") / "model.safetensors"
    merged = load_file(found)["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="takes a part of the base weights"):
        load_adapter(adapter)


def test_expressions_in_patterns(bases, tmp_path):
    stored = tensors(["self_attn.q_proj"], rank=2) | {
        name: array for name, array in PROJECTION.items() if ".layers.1." in name
    }
    patterns = {
        "rank_pattern": {r".*layers\.[02-9]\..*": 2},
        "alpha_pattern": {r"layers\.(1|3)\.\w+\.q_proj": 1},
    }
    path = bases[False][0]
    adapter = write(tmp_path / "a", stored, **patterns)
    merged = lj.save(*lj.load_params(path, adapter=adapter), tmp_path / "out")
    for layer, scale in ((0, 6 / 2), (1, 1 / 4)):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (stored[f"{PREFIX}.{name}.lora_{x}.weight"] for x in "AB")
        before, after = (load_file(p / "model.safetensors")[f"{name}.weight"] for p in (path, merged))
        np.testing.assert_allclose(after, before + scale * b @ a, rtol=1e-4, atol=1e-5)


def test_expressions_match_as_re_does_in_bounded_time():
    names = ["", "lm_head", "model.layers.0.mlp.up_proj", "model.layers.31.self_attn.q_proj"]
    for expression in (
        r"(.*\.)?(q_proj)$",
        r".*layers\.[0-5]\..*",
        r"^model\.layers\.(0|3[0-9])\.(?:self_attn|mlp)\.(q|up)_proj",
        r".*\d{2,}.*?|lm_.+",
        r"[^m]\w*|(\w+\.?)*",
    ):
        matches = compile_expression(expression)
        assert [matches(name) for name in names] == [bool(re.fullmatch(expression, name)) for name in names]
    for hostile in ("(a+)+b", "((a|a)*)*b", "(((((a?){200}){200}){200}){200}){200}b"):
        assert not compile_expression(hostile)("a" * 200)
    for unsupported in ("(", "a++", "(?=a)", r"(a)\1", "a{999}", "(" * 30 + ")" * 30, "[z-a]", "a" * 9999):
        with pytest.raises(UnsupportedExpression):
            compile_expression(unsupported)


@pytest.mark.parametrize(
    ("fields", "stored", "message"),
    [
        ({}, {f"{EMBED}.weight": LARGER}, "lm_head.weight is missing, of 293 rows"),
        ({}, {f"{NORM}.weight": random(8)}, "model.norm.weight [8] should be [16]"),
        ({}, {f"{PREFIX}.model.layers.5.input_layernorm.weight": random(16)}, "not in the base model"),
        ({"modules_to_save": ["lm_head"]}, {}, "those of 'lm_head', which modules_to_save names"),
        (
            {"trainable_token_indices": [999]},
            {f"{EMBED}.token_adapter.trainable_tokens_delta": TOKENS[:1]},
            "model.embed_tokens.weight [1000, 16] should be [288, 16]",
        ),
        (
            {"trainable_token_indices": IDS},
            {f"{EMBED}.token_adapter.trainable_tokens_delta": TOKENS[:1]},
            "has 1 rows for 3 token indices",
        ),
        (
            {},
            {f"{EMBED}.lora_embedding_A": A},
            "missing tensors: base_model.model.model.embed_tokens.lora_emb",
        ),
        (
            {},
            {name: x[:, :2] for name, x in EMBED_LORA.items()},
            "lora_embedding_B [16, 2] should have rank 4",
        ),
        (
            {"lora_bias": True},
            {f"{PREFIX}.model.layers.0.self_attn.q_proj.lora_B.bias": random(16)},
            "a trained bias (lora_bias), and a Llama has none",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(fields, stored, message, bases, tmp_path):
    adapter = write(tmp_path / "a", PROJECTION | stored, target_modules=["q_proj"], **fields)
    with pytest.raises((CheckpointError, ConfigError)) as error:
        lj.load_params(bases[False][0], adapter=adapter)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_biases_that_are_zero_are_none(bases, tmp_path):
    bias = {
        f"{PREFIX}.model.layers.{i}.self_attn.q_proj.lora_B.bias": np.zeros(16, np.float32) for i in (0, 1)
    }
    fields = {"target_modules": ["q_proj"], "fan_in_fan_out": True}
    with_bias = write(tmp_path / "a", PROJECTION | bias, lora_bias=True, **fields)
    found, expected = (
        lj.load_params(bases[False][0], adapter=adapter)[1]["layers"]["attention"]["wq"]
        for adapter in (with_bias, write(tmp_path / "b", PROJECTION, **fields))
    )
    np.testing.assert_array_equal(found, expected)


def test_an_adapter_is_a_model(bases, tmp_path):
    """Its own directory, one named after it, or one beside a whole model; with its own tokenizer."""
    path = bases[False][0]
    fields = {"target_modules": ["q_proj"], "base_model_name_or_path": str(path)}
    table = random(340, WIDTH)
    stored = PROJECTION | {f"{EMBED}.weight": table, f"{HEAD}.weight": table}
    adapter = write(tmp_path / "saved" / "mine", stored, **fields)
    vocabulary = vocabularies.llama_json(vocabularies.sentencepiece_model())
    vocabularies.write_json(adapter / "tokenizer.json", vocabulary)
    expected = lj.load_params(path, adapter=adapter)[1]
    beside = shutil.copytree(path, tmp_path / "beside")
    for file in adapter.iterdir():
        shutil.copy(file, beside)
    for name in (adapter, tmp_path / "saved", beside):
        model = lj.load(name)
        np.testing.assert_array_equal(model.params["embed"]["embedding"], expected["embed"]["embedding"])
        np.testing.assert_array_equal(
            model.params["layers"]["attention"]["wq"], expected["layers"]["attention"]["wq"]
        )
        assert model.tokenizer.vocab_size == model.config.vocab_size == 340
        assert model.tokenizer.decode(model.tokenizer.encode("the quick fox")) == "the quick fox"
    inner = shutil.copytree(path, tmp_path / "inner")
    shutil.copytree(adapter, inner / "adapter")
    assert lj.load_params(inner)[0].vocab_size == ROWS  # as in transformers: subdirectories are not read
    shutil.copytree(adapter, tmp_path / "saved" / "other")
    with pytest.raises(
        CheckpointError, match=r"has several adapters \(mine, other\); give the directory of one"
    ):
        lj.load_params(path, adapter=tmp_path / "saved")


def test_a_base_model_that_is_not_there_is_named(tmp_path):
    adapter = write(tmp_path / "a", PROJECTION, base_model_name_or_path="/no/such model")
    with pytest.raises(
        CheckpointError, match=r"'/no/such model' .* the base model that the adapter .*a names"
    ):
        lj.load_params(adapter)


def test_saved_modules_of_half_precision(bases, tmp_path):
    half = {f"{EMBED}.weight": TABLE.astype(np.float16), f"{HEAD}.weight": OTHER.astype(np.float16)}
    fields = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
    adapter = write(tmp_path / "a", PROJECTION, **fields)
    save_file(PROJECTION | half, adapter / "adapter_model.safetensors")
    params = lj.load_params(bases[True][0], adapter=adapter)[1]
    np.testing.assert_array_equal(params["lm_head"]["kernel"].T, OTHER.astype(np.float16))
