"""Compiles a published run's step with MaxText's own code, and keeps the program.

    python3.12 -m venv maxtext && maxtext/bin/pip install 'maxtext[tpu]==0.2.5'
    maxtext/bin/python benchmarks/maxtext_dump.py FOLDER llama2-70b-v5p-128 ...

No TPU is needed. FOLDER/NAME.hlo.gz is the scheduled program and FOLDER/NAME.json what
`benchmarks.published` needs beside it: the mesh, the places of its devices, the model's sizes, the memory.
Each program is compiled in a process of its own, since libtpu reads its flags once.
"""

from __future__ import annotations

import gzip
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from published_runs import PUBLISHED

# MaxText's names by those of `llama_jax.LlamaConfig`.
_SIZES = {
    "hidden_size": "emb_dim",
    "intermediate_size": "mlp_dim",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_hidden_layers": "num_decoder_layers",
    "vocab_size": "vocab_size",
}
_COMMON = {
    "enable_checkpointing": False,
    "use_iota_embed": True,
    "dataset_type": "synthetic",
    "reuse_example_batch": 1,
    "attention": "flash",
    "base_output_directory": "/tmp/maxtext",
    "run_name": "dump",
    "steps": 15,
    "compile_topology_num_slices": 1,
}


def dump(name: str, folder: Path) -> None:
    """Compiles one run in this process."""
    run = PUBLISHED[name]
    os.environ |= {
        "LIBTPU_INIT_ARGS": run.flags,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    started = time.monotonic()
    compile_step = train_compile.jit_and_compile

    def keep(*args: Any, **kwargs: Any) -> Any:
        compiled = compile_step(*args, **kwargs)
        bound = inspect.signature(compile_step).bind(*args, **kwargs).arguments
        mesh, config = bound["mesh"], bound["config"]
        memory = compiled.memory_analysis()
        about = {
            "mesh": dict(mesh.shape),
            "places": [
                [getattr(one, "slice_index", None) or 0, *one.coords, one.core_on_chip]
                for one in mesh.devices.flat
            ],
            "model": {ours: int(getattr(config, theirs)) for ours, theirs in _SIZES.items()},
            "batch": int(config.global_batch_size_to_train_on),
            "length": int(config.max_target_length),
            "peak_bytes": int(memory.peak_memory_in_bytes),
            "seconds": round(time.monotonic() - started),
            "maxtext": getattr(maxtext, "__version__", "0.2.5"),
        }
        with gzip.open(folder / f"{name}.hlo.gz", "wt") as file:
            file.write(compiled.as_text())
        (folder / f"{name}.json").write_text(json.dumps(about))
        print(f"{name}: {about['seconds']} s, {about['peak_bytes'] / 1e9:.1f} GB", flush=True)
        os._exit(0)

    train_compile.jit_and_compile = keep
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    settings = {**_COMMON, "compile_topology": run.slice_name, **run.settings}
    train_compile.main(["", str(base), *(f"{key}={value}" for key, value in settings.items())])


def main() -> int:
    """Runs the command."""
    if sys.argv[1:2] == ["--one"]:
        dump(sys.argv[2], Path(sys.argv[3]))
        return 1  # the program was not compiled
    folder, *names = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    statuses = [
        subprocess.run([sys.executable, __file__, "--one", name, folder], check=False).returncode
        for name in names or PUBLISHED
        if not (Path(folder) / f"{name}.json").exists()
    ]
    return max(statuses, default=0)


if __name__ == "__main__":
    sys.exit(main())
