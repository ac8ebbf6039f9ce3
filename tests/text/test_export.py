"""Exported programs: the same numbers, in a process that has JAX and not this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_jax as lj
from llama_jax.errors import InputError

BATCH, LENGTH, NEW = 2, 24, 8
ALONE = """
import json, sys
import numpy as np, jax, jax.export
from safetensors.numpy import load_file
folder = sys.argv[1]
manifest = json.load(open(folder + "/manifest.json"))
stored = load_file(folder + "/weights.safetensors")
weights = [stored[tensor["name"]] for tensor in manifest["inputs"][0]["tensors"]]
program = jax.export.deserialize(bytearray(open(folder + "/program.bin", "rb").read()))
inputs = np.load(folder + "/inputs.npz")
values = [inputs[one["name"]].astype(one["dtype"]) for one in manifest["inputs"][1:]]
outputs = program.call(weights, *values)
assert not any(name.startswith("llama_jax") for name in sys.modules)
np.savez(folder + "/outputs.npz", **{one["name"]: x for one, x in zip(manifest["outputs"], outputs)})
"""


@pytest.fixture(scope="module")
def model(shared_data) -> lj.Model:
    return lj.load(shared_data / "stories260K" / "stories260K.bin")


def called(exported: Any, *inputs: Any) -> Any:
    return jax.export.deserialize(bytearray(exported.serialized)).call(
        list(exported.weights.values()), *inputs
    )


def test_generation_in_another_process_gives_the_same_tokens(model, tmp_path):
    exported = lj.export(model, "generate", batch=BATCH, max_length=LENGTH, max_new_tokens=NEW)
    assert exported.manifest["platforms"] == ["cpu", "cuda", "tpu"]
    folder = exported.save(tmp_path / "out")
    rows = [model.encode_prompt(text) for text in ("The cat", "Once upon a time there was")]
    tokens = np.zeros((BATCH, LENGTH - NEW), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in rows])
    settings = {"temperature": [0.0, 0.8], "top_k": [0, 20], "top_p": [1.0, 0.9], "min_p": [0.0, 0.0]}
    np.savez(folder / "inputs.npz", tokens=tokens, lengths=lengths, seed=3, **settings)
    done = subprocess.run([sys.executable, "-c", ALONE, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sampling = lj.Sampling(**{name: jnp.array(value) for name, value in settings.items()})
    expected = lj.generate(
        model.config,
        model.params,
        tokens,
        lengths,
        jax.random.key(3),
        sampling,
        max_new_tokens=NEW,
        eos_id=model.tokenizer.eos_ids,
    )
    found = np.load(folder / "outputs.npz")
    np.testing.assert_array_equal(found["tokens"], expected.tokens)
    np.testing.assert_array_equal(found["lengths"], expected.lengths)
    np.testing.assert_allclose(found["logprobs"], expected.logprobs, atol=1e-4)


def test_logits_and_steps_are_those_of_the_model(model):
    tokens = np.array([model.encode_prompt("Once upon a time")[:4]] * BATCH, np.int32)
    expected = lj.forward(model.config, model.params, tokens)
    exported = lj.export(model, "forward", batch=BATCH, max_length=4, platforms=["cpu"])
    (logits,) = called(exported, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    step = lj.export(model, "step", batch=BATCH, max_length=8, platforms=["cpu"])
    slots = step.manifest["inputs"][3]["tensors"]
    cache = [np.zeros(slot["shape"], slot["dtype"]) for slot in slots]
    run = jax.export.deserialize(bytearray(step.serialized)).call
    for place in range(4):
        positions = np.full(BATCH, place, np.int32)
        logits, cache = run(list(step.weights.values()), tokens[:, place], positions, cache)
        np.testing.assert_allclose(logits, expected[:, place], atol=1e-4)


def test_the_manifest_is_the_calling_convention_and_bf16_weights_are_stored(model, tmp_path):
    small = lj.Model(
        model.config,
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params),
        model.tokenizer,
        model.path,
    )
    exported = lj.export(small, "forward", batch=1, max_length=4, platforms=["cpu"])
    folder = exported.save(tmp_path / "small")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [one["name"] for one in manifest["inputs"]] == ["weights", "tokens"]
    assert manifest["inputs"][1] == {"name": "tokens", "dtype": "int32", "shape": [1, 4]}
    stored = load_file(folder / "weights.safetensors")
    for tensor in manifest["inputs"][0]["tensors"]:
        assert list(stored[tensor["name"]].shape) == tensor["shape"]
        assert stored[tensor["name"]].dtype.name == tensor["dtype"] == "bfloat16"
    assert sorted(path.name for path in exported.save(tmp_path / "bare", weights=False).iterdir()) == [
        "manifest.json",
        "program.bin",
    ]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("train", {}, "function 'train' is unknown; use one of generate, forward, step"),
        ("forward", {"platforms": ["gpu"]}, "platforms 'gpu' is unknown; use one of cpu, cuda"),
        ("forward", {"platforms": []}, "platforms is []; give a list"),
        ("forward", {"max_length": 1000}, "the model's context has 512 positions"),
        ("generate", {"max_length": 32, "max_new_tokens": 32}, "it must be below max_length, 32"),
        ("step", {"batch": 0}, "batch"),
    ],
)
def test_bad_input_is_named(model, function, options, message):
    with pytest.raises(InputError) as error:
        lj.export(model, function, **options)
    assert message in str(error.value)


def test_a_folder_that_exists_is_kept(model, tmp_path):
    exported = lj.export(model, "forward", batch=1, max_length=4, platforms=["cpu"])
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(InputError, match="exists; give a folder that does not"):
        exported.save(tmp_path / "mine")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["mine"]
