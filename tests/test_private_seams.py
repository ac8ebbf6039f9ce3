"""Private names of other packages that this project uses: what is used, where, and what would replace it.

A test fails where the installed version no longer has one. Experimental modules with a public name
(`jax.experimental.pallas`, `grain.experimental`) are not listed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Seam:
    """One private name.

    Attributes:
      package: the distribution that it is part of.
      name: the private name.
      files: where it is used.
      replacement: the public interface that would replace it.
      exists: whether the installed version has it; raises or returns False otherwise.
    """

    package: str
    name: str
    files: tuple[str, ...]
    replacement: str
    exists: Callable[[], object]


def varying_axes() -> bool:
    """A value inside `shard_map` carries the mesh axes that it varies over."""
    found = []

    def local(x: jax.Array) -> jax.Array:
        found.append(jax.typeof(x).manual_axis_type.varying)
        return x

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("a",), axis_types=auto, devices=jax.devices()[:2])
    jax.eval_shape(jax.shard_map(local, mesh=mesh, in_specs=P("a"), out_specs=P("a")), jnp.zeros(2))
    return found == [{"a"}]


def orbax_metadata() -> bool:
    package = Path(importlib.import_module("orbax.checkpoint").__file__ or "").parent
    texts = [path.read_text() for path in (package / "_src").rglob("*.py")]
    return all(any(f"'{name}'" in text for text in texts) for name in ("_METADATA", "_CHECKPOINT_METADATA"))


def packer_state() -> bool:
    import grain
    from grain.experimental import ConcatThenSplitIterDataset

    documents = grain.MapDataset.source([{"tokens": np.arange(3)}]).to_iter_dataset()
    packer = iter(ConcatThenSplitIterDataset(documents, length_struct={"tokens": 2}))
    return "parent_state" in packer.get_state()


def parent_dataset() -> bool:
    import grain

    parent = grain.MapDataset.source([1])
    return parent.map(lambda x: x)._parent is parent


def option_strings() -> bool:
    parser = argparse.ArgumentParser()
    action = parser.add_argument("--name")
    return parser._option_string_actions["--name"] is action


def jax_clusters() -> bool:
    from jax._src import clusters
    from jax._src.clusters import cloud_tpu_cluster

    assert callable(cloud_tpu_cluster.get_metadata) and hasattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm")
    return all(callable(kind.is_env_present) for kind in clusters.ClusterEnv._cluster_types)


CLIENT_METHODS = ("key_value_set", "key_value_dir_get", "blocking_key_value_get", "key_value_delete")


def coordination_client() -> bool:
    from jax._src.distributed import global_state
    from jax._src.lib import _jax

    client = _jax.DistributedRuntimeClient
    return {"client", "process_id", "num_processes"} <= set(dir(global_state)) and all(
        callable(getattr(client, name)) for name in CLIENT_METHODS
    )


def partial_shard_map() -> bool:
    """JAX 0.10 lowers the shardings of a `shard_map` by this function, which `sum_over_data` corrects."""
    from jax._src import shard_map

    function = shard_map._shardy_shard_map_sharding
    return list(inspect.signature(function).parameters)[:4] == ["ctx", "mesh", "manual_axes", "spec"]


def cudnn_attention_names() -> bool:
    from jax._src.cudnn import fused_attention_stablehlo

    wrapper = fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper
    return wrapper.name == "dot_product_attention_fwd_wrapper" and callable(
        fused_attention_stablehlo.check_cudnn_version
    )


def driver_choice() -> bool:
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils as utils

    chosen = inspect.getsource(utils._build_ocdbt_kvstore_tspec)
    asked = (
        "_normalize_path(directory)",
        "_use_gcs_driver(directory)",
        "gcs_utils.get_kvstore_for_gcs(directory)",
    )
    return callable(gcs_utils.get_kvstore_for_gcs) and all(call in chosen for call in asked)


def gcs_requests() -> bool:
    file_system = pytest.importorskip("gcsfs.core").GCSFileSystem
    return inspect.iscoroutinefunction(file_system._call) and bool(file_system._location)


def s3_requests() -> bool:
    return inspect.iscoroutinefunction(pytest.importorskip("s3fs.core").S3FileSystem._call_s3)


def plugin_logger() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.logger.name == "jax._src.xla_bridge" and "logger.exception" in inspect.getsource(
        xla_bridge.discover_pjrt_plugins
    )


SEAMS = (
    Seam(
        "jax",
        "_src.shard_map._shardy_shard_map_sharding",
        ("llama_jax/ops/gradient_sums.py",),
        "jax.shard_map of JAX 0.11 and later, which keeps shardings over explicit axes",
        partial_shard_map,
    ),
    Seam(
        "jax",
        "_src.xla_bridge",
        ("llama_jax/console/loading.py", "tests/test_targets.py"),
        "a public list of the plugins that could not be started, and why",
        plugin_logger,
    ),
    Seam(
        "jax",
        "dot_product_attention_fwd_wrapper",
        ("llama_jax/ops/cudnn_attention.py",),
        "checkpoint names on what jax.nn.dot_product_attention by cuDNN keeps for its gradient",
        cudnn_attention_names,
    ),
    Seam(
        "jax",
        "_src.cudnn.fused_attention_stablehlo",
        ("tests/cuda.py",),
        "lowering of cuDNN's attention for CUDA by jax.export without an installed cuDNN",
        cudnn_attention_names,
    ),
    Seam(
        "jax",
        "manual_axis_type",
        ("llama_jax/ops/spmd.py",),
        "a documented accessor for the device-varying axes of a value inside jax.shard_map",
        varying_axes,
    ),
    Seam(
        "jax",
        "_src.clusters",
        ("tests/train/test_launched.py",),
        "a public function that returns the cluster environment which jax.distributed.initialize detects",
        jax_clusters,
    ),
    Seam(
        "jax",
        "_src.distributed.global_state",
        ("llama_jax/decoding/processes.py", "train/coordination.py"),
        "the key-value store of the coordination service, as a public interface",
        coordination_client,
    ),
    Seam(
        "jax",
        "jax_platforms",
        ("train/devices.py",),
        "a public getter for the platforms that JAX may use",
        lambda: hasattr(jax.config, "jax_platforms"),
    ),
    Seam(
        "orbax-checkpoint",
        "_METADATA",
        ("llama_jax/weights/orbax_tree.py",),
        "a function that tells whether a folder is an Orbax tree without reading it",
        orbax_metadata,
    ),
    Seam(
        "orbax-checkpoint",
        "_src._normalize_path._use_gcs_driver",
        ("llama_jax/weights/orbax_paths.py",),
        "Orbax's support of s3:// (its Composite of storage backends), and paths as TensorStore specs",
        driver_choice,
    ),
    Seam(
        "gcsfs",
        "_call._location",
        ("llama_jax/storage/writing.py",),
        "pipe_file with ifGenerationMatch",
        gcs_requests,
    ),
    Seam(
        "s3fs",
        "_call_s3",
        ("llama_jax/storage/reading.py", "llama_jax/storage/writing.py"),
        "cat_file and pipe_file with IfMatch",
        s3_requests,
    ),
    Seam(
        "grain",
        "parent_state",
        ("train/data/batches.py",),
        "statistics of a parent iterator, readable through ConcatThenSplitIterDataset",
        packer_state,
    ),
    Seam("grain", "_parent", ("train/data/order.py",), "MapDataset.parents", parent_dataset),
    Seam(
        "argparse (Python)",
        "_option_string_actions",
        ("llama_jax/console/parser.py",),
        "a public list of a parser's options",
        option_strings,
    ),
    Seam(
        "transformers",
        "_attn_implementation",
        ("benchmarks/workers.py",),
        "a public getter for the attention implementation of a loaded model",
        lambda: hasattr(pytest.importorskip("transformers").LlamaConfig(), "_attn_implementation"),
    ),
    Seam(
        "trl",
        "_compute_loss",
        ("tests/parity/test_finetuning.py",),
        "a public loss function of DPOTrainer",
        lambda: pytest.importorskip("trl").DPOTrainer._compute_loss,
    ),
    Seam(
        "trl",
        "_metrics",
        ("tests/parity/test_finetuning.py",),
        "the metrics of one loss, returned with it",
        lambda: "self._metrics" in inspect.getsource(pytest.importorskip("trl").DPOTrainer),
    ),
)


def name_of(seam: Seam) -> str:
    return f"{seam.package} {seam.name}"


PARITY = ("transformers", "trl")  # are installed for `make parity` only


@pytest.mark.parametrize(
    "seam",
    [pytest.param(seam, marks=[pytest.mark.parity] * (seam.package in PARITY)) for seam in SEAMS],
    ids=name_of,
)
def test_the_installed_version_has_it(seam):
    try:
        found = seam.exists()
    except (AttributeError, ImportError, KeyError, TypeError, AssertionError) as error:
        found, why = False, f" ({type(error).__name__}: {error})"
    else:
        why = ""
    assert found, (
        f"{seam.package} no longer has the private {seam.name}{why}: change {', '.join(seam.files)}; "
        f"look for {seam.replacement}"
    )


@pytest.mark.parametrize("seam", SEAMS, ids=name_of)
def test_it_is_still_used(seam):
    for file in seam.files:
        text = (ROOT / file).read_text()
        parts = [seam.name, *seam.name.split(".")]
        assert any(part in text for part in parts), f"{file} no longer uses {seam.name}: delete its row"


def private_names(tree: ast.AST) -> set[str]:
    """Private attributes that a file reads and private modules or names that it imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            found |= {part for name in [module, *(a.name for a in node.names)] for part in name.split(".")}
    return {name for name in found if name.startswith("_") and not name.endswith("__")}


def defined_names(tree: ast.AST) -> set[str]:
    """Functions, classes, variables and attributes that a file defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def test_every_private_name_is_listed():
    paths = [path for path in (ROOT / "llama_jax").rglob("*.py") if "train" not in path.parts]
    paths += (ROOT / "train").rglob("*.py")
    trees = {path: ast.parse(path.read_text()) for path in paths}
    ours = {name for tree in trees.values() for name in defined_names(tree)}
    ours |= {"_replace", "_asdict", "_fields", "_exit", "_thread"}  # documented
    ours |= {
        "_info",
        "_ls",
        "_find",
        "_cat_file",
        "_pipe_file",
        "_rm_file",
        "_cp_file",
    }  # fsspec
    for path, tree in trees.items():
        file = str(path.relative_to(ROOT))
        listed = {part for seam in SEAMS if file in seam.files for part in seam.name.split(".")}
        extra = private_names(tree) - ours - listed
        assert not extra, f"{file} uses {', '.join(sorted(extra))} of another package: list it in SEAMS"
