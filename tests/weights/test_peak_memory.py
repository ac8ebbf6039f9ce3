"""What a host holds while it loads 600 MB onto 8 devices: the parameters, and little more than a matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llama_jax as lj
from llama_jax.weights import load
from tests.train.fork_server import ROOT

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CONFIG = lj.LlamaConfig(**SIZES)
# Of the parameters, above what the process had before: 1.37 and 1.48 here. Beside them are the matrix that is
# read, in its own layout and in the leaf's, a layer of that leaf, and what compiling takes.
MOST = 1.6

CHILD = """
import json, sys
import jax
from jax.sharding import Mesh
from llama_jax.meshes import make_mesh
from llama_jax.weights import load_params, open_source

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

path, by_rows = sys.argv[1:]
Mesh.is_multi_process = by_rows == "True"
mesh = make_mesh("fsdp=4,tensor=2")
before = memory("VmRSS")
params = load_params(open_source(path), mesh=mesh, dtype="bfloat16")
nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"nbytes": nbytes, "peak": memory("VmHWM") - before}))
"""


def write_sparse(folder: Path) -> Path:
    """A Hugging Face directory of zeros, which takes no room on the disk."""
    header, size = {}, 0
    for entry in load.entries(CONFIG, "hf"):
        shape = entry.leaf.stored_shape(CONFIG, "hf")
        nbytes = 2
        for n in shape:
            nbytes *= n
        span = [size, size + nbytes]
        header[entry.name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": span}
        size += nbytes
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_host_holds_the_parameters_and_a_matrix(tmp_path):
    """Of one process, and by the rows of each device, as on several."""
    folder = write_sparse(tmp_path / "model")
    # Programs as a user's: half of the time would go into those that are not optimized.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, folder, mode], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for mode in ("False", "True")
    ]
    for process in running:
        found = json.loads(process.communicate()[0])
        assert 5e8 < found["nbytes"] < 7e8
        assert found["peak"] < MOST * found["nbytes"], found
