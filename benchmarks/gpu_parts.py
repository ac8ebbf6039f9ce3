"""One part of `benchmarks.gpu` in its own process: `python -m benchmarks.gpu_parts PART OUT [--tiny]`."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax as lj
from benchmarks.gpu_shapes import DECODE_BATCHES, NEW_TOKENS, PREFILL, PROMPT, TRAIN, Shape, shapes
from llama_jax.eval.throughput import measure
from llama_jax.ops.cudnn_attention import refusal
from llama_jax.plan.flops import flops_per_token
from llama_jax.train import gpu
from llama_jax.train.config.run import AdapterConfig, ModelConfig, RunConfig, TrainConfig
from llama_jax.train.devices import attention_backend, compute_dtype, resolve_attention
from llama_jax.train.metrics.peak_flops import peak_flops
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import init_state
from llama_jax.train.step import build_step
from llama_jax.train.trainable import TrainableSpec

# Bytes/s of the memory, from NVIDIA's data sheets, by prefix of `device_kind`.
HBM_BANDWIDTH = {
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA A100": 1.555e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA B200": 8.0e12,
}
SMALL = lj.LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)


def model_of(shape: Shape) -> lj.LlamaConfig:
    """The model's configuration."""
    fields = {k: v for k, v in shape.as_dict().items() if k not in ("batch", "seq_len", "lora_rank")}
    return lj.LlamaConfig(**fields, max_position_embeddings=shape.seq_len)


def packed(rng: np.random.Generator, batch: int, length: int, vocab_size: int) -> dict[str, np.ndarray]:
    """A batch of pretraining: random tokens, in rows of four documents of unequal lengths."""
    segments = np.ones((batch, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    for row in range(batch):
        for start in np.sort(rng.choice(np.arange(1, length), 3, replace=False)):
            segments[row, start:] += 1
            positions[row, start:] = np.arange(length - start)
    tokens = rng.integers(0, vocab_size, (batch, length), dtype=np.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}


def relative(found: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest value."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    arrays = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in arrays)


def correctness(tiny: bool) -> dict[str, Any]:
    """Logits, gradients and generated tokens beside the CPU's: in f32, and in bf16 by each backend."""
    length = 64 if tiny else 512
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    batch = packed(np.random.default_rng(0), 2, length, SMALL.vocab_size)
    with jax.default_device(cpu):
        params = jax.device_get(lj.init(SMALL, jax.random.key(0)))

    def logits_and_gradients(on: Any, options: lj.ForwardOptions) -> tuple[Any, Any]:
        placed, arrays = jax.device_put((params, batch), on)
        tokens, positions, segments = (arrays[name] for name in ("tokens", "positions", "segment_ids"))
        logits = lj.forward(SMALL, placed, tokens, positions, segments, options=options)

        def loss(params: Any) -> jax.Array:
            mask = segments > 0
            return lj.next_token_loss(SMALL, params, tokens, mask, positions, segments, options=options).mean

        return jax.device_get((logits, jax.jit(jax.grad(loss))(placed)))

    def generated(on: Any) -> np.ndarray:
        placed, tokens = jax.device_put((params, batch["tokens"][:, :32]), on)
        lengths = jax.device_put(np.array([32, 20], np.int32), on)
        key, greedy = jax.device_put(jax.random.key(0), on), lj.Sampling(temperature=0.0)
        out = lj.generate(SMALL, lj.unstack(placed), tokens, lengths, key, greedy, max_new_tokens=64)
        return np.asarray(out.tokens)

    with jax.default_matmul_precision("highest"):
        with jax.default_device(cpu):
            wanted, tokens = logits_and_gradients(cpu, lj.ForwardOptions()), generated(cpu)
        found = logits_and_gradients(device, lj.ForwardOptions(custom_vjp=True))
        same = generated(device) == tokens
    differences = {
        "f32_logits": relative(found[0], wanted[0]),
        "f32_gradients": relative(found[1], wanted[1]),
    }
    shape = {"batch": 2, "length": length, "heads": 8, "kv_heads": 2, "head_dim": 64}
    why_not = refusal(**shape, dtype=jnp.dtype(jnp.bfloat16), device=device)  # type: ignore[arg-type]
    for backend in ("xla", "blockwise", *(["cudnn"] if why_not is None else [])):
        options = lj.ForwardOptions(dtype="bfloat16", attention_backend=backend, custom_vjp=True)  # type: ignore
        found = logits_and_gradients(device, options)
        differences[f"bf16_{backend}_logits"] = relative(found[0], wanted[0])
        differences[f"bf16_{backend}_gradients"] = relative(found[1], wanted[1])
    limits = {"f32_logits": 1e-4, "f32_gradients": 1e-3}
    wrong = [name for name, value in differences.items() if not value <= limits.get(name, 0.1)]
    if wrong or same.mean() < 0.9:
        raise SystemExit(f"error: wrong: {wrong}; {same.mean():.0%} of tokens as on the CPU; {differences}")
    return {"differences": differences, "same_greedy_tokens": float(same.mean()), "cudnn_refused": why_not}


def decode(shape: Shape, tiny: bool) -> dict[str, Any]:
    """Greedy decoding of bf16 weights."""
    config = model_of(shape)
    make = jax.jit(lambda key: lj.unstack(lj.init(config, key, jnp.bfloat16)))
    params = jax.block_until_ready(make(jax.random.key(0)))
    kind = jax.devices()[0].device_kind
    sheet = next((value for name, value in HBM_BANDWIDTH.items() if kind.startswith(name)), None)
    rows = []
    for batch in DECODE_BATCHES:
        speed = measure(
            config,
            params,
            batch=batch,
            prompt_tokens=PREFILL,
            new_tokens=NEW_TOKENS,
            repeats=1 if tiny else 3,
        )
        rows.append(
            {
                "batch": batch,
                "tokens_per_second": speed.decode_tokens_per_second,
                "prefill_tokens_per_second": speed.prefill_tokens_per_second,
                "bytes_per_second": speed.bytes_per_second,
                "measured_bandwidth": speed.memory_bandwidth,
                "bandwidth_share": speed.bytes_per_second / (sheet or speed.memory_bandwidth),
                "share_of": "data sheet" if sheet else "measured bandwidth",
            }
        )
    return {"device": kind, "prompt": PROMPT, "new_tokens": NEW_TOKENS, "rows": rows}


def train(shape: Shape, lora: bool, tiny: bool) -> dict[str, Any]:
    """The trainer's step on packed rows: full finetuning from f32 parameters, or LoRA on a bf16 base."""
    batch = shape.batch
    while True:
        try:
            return _train(shape, batch, lora, tiny)
        except RuntimeError as error:
            if batch == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
        batch //= 2


def _train(shape: Shape, batch: int, lora: bool, tiny: bool) -> dict[str, Any]:
    device, model, notes = jax.devices()[0], model_of(shape), []
    run = RunConfig(
        # `init_from` is not read: weights are random.
        model=ModelConfig(init_from="random" if lora else ""),
        adapter=AdapterConfig(type="lora", rank=shape.lora_rank) if lora else AdapterConfig(),
        train=TrainConfig(
            steps=100,
            global_batch_size=batch,
            seq_len=shape.seq_len,
            dtype="bfloat16",
            remat="save_projections",
        ),
    )
    run = resolve_attention(run, model, None, device, notes.append)
    spec = TrainableSpec.from_config(run, device.platform)
    step, *abstract = build_step(run, model, None, device.platform, spec)
    started = time.perf_counter()
    compiled = gpu.compile_step(step.lower(*abstract), model)
    compile_seconds = time.perf_counter() - started
    optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
    state, frozen = init_state(model, optimizer, 0, trainable_spec=spec)
    arrays = jax.device_put(packed(np.random.default_rng(0), batch, shape.seq_len, model.vocab_size), device)
    losses, seconds = [], []
    for index in range(1 + TRAIN["warm_up"] if tiny else sum(TRAIN.values())):
        started = time.perf_counter()
        state, metrics = compiled(state, arrays, frozen)
        losses.append(float(metrics.loss))
        if index >= TRAIN["warm_up"]:
            seconds.append(time.perf_counter() - started)
    if not np.isfinite(losses).all():
        raise SystemExit(f"error: the losses are {losses}")
    tokens = batch * shape.seq_len / statistics.median(seconds)
    peak = peak_flops(compute_dtype(run.train, device.platform))
    flops = functools.partial(flops_per_token, model, shape.seq_len, frozen=lora)
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "batch": batch,
        "seq_len": shape.seq_len,
        "parameters": model.num_params,
        "lora_rank": shape.lora_rank if lora else None,
        "attention": attention_backend(run.train, device.platform),
        "notes": notes,
        "remat": run.train.remat,
        "tokens_per_second": tokens,
        "seconds_per_step": seconds,
        "mfu": tokens * flops(causal=True) / peak if peak else None,
        "mfu_full_attention": tokens * flops(causal=False) / peak if peak else None,
        "peak_flops": peak,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "compile_seconds": compile_seconds,
        "losses": [losses[0], losses[-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part")
    parser.add_argument("out")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    kind, _, rest = args.part.partition("_")
    if not args.tiny and jax.devices()[0].platform != "gpu":
        gpu.note_unused_gpu(print)
        raise SystemExit("error: JAX does not use the GPU")
    if kind == "correctness":
        result = correctness(args.tiny)
    elif kind == "decode":
        result = decode(shapes(args.tiny)[rest], args.tiny)
    else:
        name, _, lora = rest.partition("_")
        result = train(shapes(args.tiny)[name], bool(lora), args.tiny)
    Path(args.out).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
