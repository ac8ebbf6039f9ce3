"""Conversion between all formats is bit-exact; saving models; bad input."""

from __future__ import annotations

import itertools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.cli import main
from llama_jax.errors import CheckpointError, ConfigError, InputError, TokenizerError
from llama_jax.eval.verify import compare
from llama_jax.text.convert import convert, save
from llama_jax.text.model import Model
from llama_jax.tokenizer import load_tokenizer
from llama_jax.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, Piece, build_model
from llama_jax.weights import load_params, open_source
from llama_jax.weights.tensors import StoredTensors
from tests.random_models import random_model

LLAMA2 = lj.LlamaConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=4,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
MODELS = {
    "multi-head": LLAMA2,
    "grouped": LLAMA2.replace(num_key_value_heads=8),
    "grouped, tied": LLAMA2.replace(num_key_value_heads=8, tie_word_embeddings=True),
}
# Output names and their `convert` options.
OUTPUTS = {
    "hf": {"format": "hf"},
    "hf-3": {"format": "hf", "shards": 3},
    "meta": {"format": "meta"},
    "meta-2": {"format": "meta", "shards": 2},
    "meta-8": {"format": "meta", "shards": 8},
    "gguf": {"format": "gguf"},
    "llama2c": {"format": "llama2c"},
    "orbax": {"format": "orbax"},
}


def vocabulary(size):
    """A SentencePiece model with `size` pieces, in the order of Llama's."""
    special = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    every_byte = [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    texts = [SPACE, *"w0123456789", *(f"w{number}" for number in range(size - 3 - 256 - 12))]
    pieces = [Piece(text, -float(rank), NORMAL) for rank, text in enumerate(texts)]
    return build_model([*special, *every_byte, *pieces], "a test").serialized_model_proto()


def model_on_disk(folder, config, dtype="float32"):
    """A Hugging Face directory of a random model, and its parameters."""
    config, params = random_model(3, config)
    params = jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(jnp.dtype(dtype))), params)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(vocabulary(config.vocab_size))
    tokenizer = load_tokenizer(folder)
    shutil.rmtree(folder)
    save(Model(config, params, tokenizer, folder, None), folder)
    return params


def identical(a, b):
    """Whether two trees have the same types and values; in numpy, which compiles nothing."""
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.mark.parametrize("kind", MODELS)
def test_every_format_converts_to_every_other_bit_for_bit(tmp_path, kind):
    """Each pair of formats with one kind of model, each kind with every source and every output."""
    params = model_on_disk(tmp_path / "source", MODELS[kind])
    text = load_tokenizer(tmp_path / "source").encode("w3 w17w5 w90")
    sources = ("hf", "meta-8", "gguf", "llama2c", "orbax")
    for name in sources:
        convert(tmp_path / "source", tmp_path / name, **OUTPUTS[name])
    for (i, one), (j, other) in itertools.product(enumerate(sources), enumerate(OUTPUTS)):
        if (i + j) % len(MODELS) != list(MODELS).index(kind):
            continue
        target = convert(tmp_path / one, tmp_path / f"{one} to {other}", **OUTPUTS[other])
        source = open_source(target)
        assert source.config == MODELS[kind], (one, other)
        assert identical(load_params(source), params), (one, other)
        assert load_tokenizer(source.tokenizer_dir or target).encode("w3 w17w5 w90") == text, (one, other)


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_round_trip_through_all_formats_that_support_it(tmp_path, kind):
    params = model_on_disk(tmp_path / "0", MODELS[kind], "bfloat16")
    round_trip = ["meta-2", "gguf", "orbax", "hf-3", "meta-8", "hf"]
    for step, name in enumerate(round_trip):
        convert(tmp_path / str(step), tmp_path / str(step + 1), **OUTPUTS[name])
    source = open_source(tmp_path / str(len(round_trip)))
    assert identical(load_params(source, dtype="bfloat16"), params)
    matrices = {info.dtype for info in source.tensors.values() if len(info.shape) > 1}
    assert matrices == {"BF16"}


def test_stories260k_round_trip_through_all_formats(tmp_path, shared_data):
    path = shared_data / "stories260K" / "stories260K.bin"
    before = lj.load(path)
    for step, name in enumerate(["hf", "meta", "gguf", "orbax", "llama2c"]):
        path = convert(path, tmp_path / str(step), **OUTPUTS[name])
    after = lj.load(path)
    assert identical(after.params, before.params)
    assert after.config == before.config
    text = "Once upon a time, there was a little girl"
    ids = before.tokenizer.encode(text)
    assert after.tokenizer.encode(text) == ids
    assert after.tokenizer.decode(ids) == before.tokenizer.decode(ids)
    assert after.tokenizer.eos_ids == before.tokenizer.eos_ids  # all that `generate` depends on


@pytest.fixture(scope="module")
def smollm2_through_all_formats(tmp_path_factory, smollm2_path):
    """A GGUF file of a small model with its vocabulary, and what it was made of."""
    folder = tmp_path_factory.mktemp("smollm2")
    narrow = {"num_hidden_layers": 2, "hidden_size": 72, "intermediate_size": 96, "head_dim": 8}
    config, params = random_model(3, lj.presets.SMOLLM2_135M.replace(**narrow))
    tokenizer = load_tokenizer(smollm2_path)
    path = folder / "hf"
    lj.save(Model(config, params, tokenizer, path, None), path, **OUTPUTS["hf-3"])
    for name in ("meta", "orbax", "gguf"):
        path = convert(path, folder / name, **OUTPUTS[name])
    return path, config, params, tokenizer


@pytest.mark.slow
def test_smollm2_round_trip_through_all_formats_that_support_its_vocabulary(
    smollm2_through_all_formats,
):
    """`test_verify.py` converts its file as a whole."""
    path, config, params, tokenizer = smollm2_through_all_formats
    after = lj.load(path)
    assert identical(after.params, params)
    assert after.config == config
    text = "Once upon a time, there was a little girl named Lily."
    assert after.tokenizer.encode(text) == tokenizer.encode(text)
    assert after.tokenizer.chat_template == tokenizer.chat_template
    assert after.tokenizer.eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize("layout", ["unstacked", "mesh"])
def test_save_writes_the_loaded_parameters(tmp_path, layout):
    params = model_on_disk(tmp_path / "source", LLAMA2)
    mesh = lj.make_mesh("fsdp=4,tensor=2") if layout == "mesh" else None
    model = lj.load(tmp_path / "source", mesh=mesh, scan_layers=layout != "unstacked")
    for name in OUTPUTS:
        lj.save(model, tmp_path / name, **OUTPUTS[name])
        assert identical(load_params(open_source(tmp_path / name)), params)


def test_the_format_is_inferred_from_the_suffix(tmp_path):
    model_on_disk(tmp_path / "source", LLAMA2)
    for name, format in (("a.gguf", "gguf"), ("b", "hf")):
        assert open_source(convert(tmp_path / "source", tmp_path / name)).format == format


def test_pooling_averaging_and_resizing(tmp_path, capsys):
    params = model_on_disk(tmp_path / "a", LLAMA2)
    (tmp_path / "larger").mkdir()
    (tmp_path / "larger" / "tokenizer.model").write_bytes(vocabulary(328))
    command = ["convert", str(tmp_path / "a"), str(tmp_path / "out"), "--to", "meta", "--kv-heads", "2"]
    command += ["--average", str(tmp_path / "a"), "--weights", "0.25", "0.75", "--vocab-size", "328"]
    assert main([*command, "--tokenizer", str(tmp_path / "larger"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "meta"
    model = lj.load(tmp_path / "out")
    assert (model.config.num_key_value_heads, model.config.vocab_size) == (2, 328)
    assert identical(model.params["layers"]["feed_forward"], params["layers"]["feed_forward"])


@pytest.mark.parametrize("format", ["hf", "meta", "gguf", "orbax"])
def test_added_tokens_are_never_produced_by_the_tokenizer(tmp_path, format):
    model_on_disk(tmp_path / "a", LLAMA2)
    model = lj.load(convert(tmp_path / "a", tmp_path / "b", format, vocab_size=328))
    assert model.config.vocab_size == model.tokenizer.vocab_size == 328
    assert model.tokenizer.encode("w3 [PAD321]") == load_tokenizer(tmp_path / "a").encode("w3 [PAD321]")
    assert model.tokenizer.decode([320, 327]) in ("", "[PAD320][PAD327]")
    if format == "hf":  # one is enough: all have the same parameters
        assert model.generate("w3", max_new_tokens=3) is not None


@pytest.mark.slow
def test_smollm2_with_added_rows_tokenizes_as_before(tmp_path, smollm2_through_all_formats):
    path, _, _, tokenizer = smollm2_through_all_formats
    model = lj.load(convert(path, tmp_path / "out", vocab_size=49_280, dtype="bfloat16"))
    text = "def f(x):\n    return [PAD49160] + x"
    assert model.tokenizer.encode(text) == tokenizer.encode(text)
    assert model.tokenizer.decode([49_200]) == ""
    assert model.tokenizer.chat_template == tokenizer.chat_template


def test_an_interrupted_conversion_is_resumed(tmp_path, monkeypatch):
    params = model_on_disk(tmp_path / "source", LLAMA2)
    seen = []

    def stop(done, total, name):
        seen.append(done)
        if len(seen) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    again = []
    convert(tmp_path / "source", tmp_path / "out", progress=lambda *args: again.append(args))
    assert again[0][0] > 0  # bytes written by the first run
    assert identical(load_params(open_source(tmp_path / "out")), params)


def test_the_command_reports_an_interruption_and_resumes(tmp_path, capsys, monkeypatch):
    model_on_disk(tmp_path / "source", LLAMA2)
    reads = []
    read = StoredTensors.read

    def stop(self, leaf, layer):
        reads.append(leaf)
        if len(reads) == 12:
            raise KeyboardInterrupt
        return read(self, leaf, layer)

    monkeypatch.setattr(StoredTensors, "read", stop)
    command = ["convert", str(tmp_path / "source"), str(tmp_path / "out")]
    assert main(command) == 130
    said = capsys.readouterr().err
    assert f"interrupted; rerun the command to resume from {tmp_path / 'out'}.partial" in said
    assert main(command) == 0
    assert "resuming at " in capsys.readouterr().err


def test_the_target_must_be_outside_of_checkpoints(tmp_path):
    model_on_disk(tmp_path / "source", LLAMA2)
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "checksums.json").touch()
    with pytest.raises(CheckpointError, match="is inside the checkpoint"):
        convert(tmp_path / "source", tmp_path / "step" / "params" / "out")


@pytest.mark.parametrize(
    ("one", "other"), [("llama2c", "hf"), ("hf", "gguf"), ("gguf", "orbax"), ("meta", "hf")]
)
def test_converted_checkpoints_verify(tmp_path, shared_data, one, other):
    first = convert(shared_data / "stories260K" / "stories260K.bin", tmp_path / "one", one)
    second = convert(first, tmp_path / "other", other)
    assert compare(first, second).same


def test_a_conversion_of_a_changed_source_starts_over(tmp_path):
    model_on_disk(tmp_path / "source", LLAMA2)

    def stop(done, total, name):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "source", tmp_path / "out", progress=stop)
    os.utime(tmp_path / "source" / "model.safetensors", (1, 1))
    again = []
    convert(tmp_path / "source", tmp_path / "out", progress=lambda *args: again.append(args))
    assert again[0][0] == 0


INVALID_OPTIONS = [
    ({"format": "onnx"}, InputError, "format is 'onnx'; it must be one of hf, meta, gguf, llama2c, orbax"),
    ({"dtype": "int4"}, InputError, "dtype is 'int4'; hf supports float32, bfloat16, float16"),
    ({"dtype": "q8_0", "format": "meta"}, InputError, "dtype is 'q8_0'; meta supports"),
    (
        {"kv_heads": 3},
        ConfigError,
        "kv_heads is 3; the model's 16 key/value heads can be pooled to 1, 2, 4, 8, 16",
    ),
    ({"shards": 3, "format": "meta"}, ConfigError, "3"),
    (
        {"shards": 2, "format": "gguf"},
        InputError,
        "shards is 2; it must be at least 1, and is only for hf",
    ),
    ({"dtype": "bfloat16", "format": "llama2c"}, InputError, "llama2c supports float32, int8"),
    ({"weights": [1.0]}, InputError, "weights are given but no checkpoints to average"),
    ({"vocab_size": 300}, TokenizerError, "the tokenizer has 320 tokens, the model 300"),
    ({"average": ["nowhere"]}, CheckpointError, "'nowhere' is neither a path nor a known model"),
]


@pytest.mark.parametrize(("options", "kind", "message"), INVALID_OPTIONS, ids=lambda value: str(value)[:30])
def test_invalid_options_leave_no_files(tmp_path, options, kind, message):
    model_on_disk(tmp_path / "source", LLAMA2)
    with pytest.raises(kind) as raised:
        convert(tmp_path / "source", tmp_path / "out", **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_quantized_parameters_cannot_be_saved(tmp_path):
    model_on_disk(tmp_path / "source", LLAMA2)
    with pytest.raises(InputError, match="load the model without bits to save it"):
        lj.save(lj.load(tmp_path / "source", bits=8), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}"], "missing"),
        (["{source}", "{out}", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["{source}", "{source}"], "already exists; remove it, or give another path"),
        (["{source}", "{out}", "--weights", "1"], "--weights needs --average"),
        (["{source}", "{out}", "--kv-heads", "0"], "'0' must be at least 1"),
        (["{source}", "{out}", "--average", "{source}", "--weights", "1", "x"], "'x' is not a number"),
        (["{source}", "{source}/out"], "is inside the source"),
        (["{source}", "/dev/null/out"], "/dev/null/out: cannot be written: Not a directory; write elsewhere"),
        (["{source}", ""], "'' cannot be written to"),
        (["{source}", "/"], "'/' cannot be written to"),
        (["{source}", "{out}.bin"], "out.bin: .bin does not tell the format; give it with format (--to)"),
        (["{source}", "{out}", "--dtpye", "float32"], "did you mean --dtype?"),
    ],
)
def test_command_errors_are_one_line(tmp_path, capsys, arguments, message):
    model_on_disk(tmp_path / "source", LLAMA2)
    before = sorted(tmp_path.rglob("*"))
    places = {"source": str(tmp_path / "source"), "out": str(tmp_path / "out")}
    assert main(["convert", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_reports_what_it_wrote(tmp_path, capsys):
    model_on_disk(tmp_path / "source", LLAMA2)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out.gguf"), "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'out.gguf'}: gguf, 21 tensors, ")
    assert out.endswith("/s\n")


def test_an_overflowing_value_is_named_and_leaves_no_output(tmp_path):
    config, params = random_model(3, LLAMA2)
    params = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * 1e6}}
    model_on_disk(tmp_path / "source", LLAMA2)
    tokenizer = load_tokenizer(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: the value .* is too large for float16"):
        save(Model(config, params, tokenizer, tmp_path, None), tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert np.isfinite(jnp.max(params["final_norm"]["scale"]))
