"""One-line faults, spread over every room, each with the tests that must catch it.

A fault is a text that occurs exactly once in its file, and what takes its place. `test_mutants.py` checks
that the texts still occur; `python -m tests.mutants` runs them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault to be caught.

    Attributes:
      name: what it is called on the command line.
      path: the file, relative to the checkout.
      fault: what is wrong with it, in a line.
      before: the text that is replaced; it occurs once in the file.
      after: the text that takes its place.
      tests: arguments of pytest: the tests that should fail.
    """

    name: str
    path: str
    fault: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, checkout: Path) -> None:
        """Puts the fault into a checkout.

        Raises:
          ValueError: if the text does not occur exactly once.
        """
        file = checkout / self.path
        text = file.read_text()
        if (count := text.count(self.before)) != 1:
            raise ValueError(f"{self.name}: {self.before!r} occurs {count} times in {self.path}, not once")
        file.write_text(text.replace(self.before, self.after))


MUTANTS = (
    # The Llama.
    Mutant(
        "rope-halves-swapped",
        "llama_jax/rope.py",
        "the rotated halves of a head are concatenated in the wrong order",
        "jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)",
        "jnp.concatenate([second * cos + first * sin, first * cos - second * sin], axis=-1)",
        ("tests/test_rope.py", "tests/test_golden.py"),
    ),
    Mutant(
        "rope-llama3-not-divided",
        "llama_jax/rope.py",
        "Llama 3's scaling leaves low frequencies undivided",
        "return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies",
        "return (1 - smooth) * frequencies + smooth * frequencies",
        ("tests/test_rope.py", "tests/test_golden.py"),
    ),
    Mutant(
        "mask-excludes-own-position",
        "llama_jax/attention.py",
        "a query does not attend to its own position",
        "allowed = self.k_positions[:, None, :] <= self.q_positions[:, :, None]",
        "allowed = self.k_positions[:, None, :] < self.q_positions[:, :, None]",
        ("tests/test_attention.py",),
    ),
    Mutant(
        "mask-ignores-segments",
        "llama_jax/attention.py",
        "packed documents attend to each other",
        "self.k_segments[:, None, :] == self.q_segments[:, :, None]",
        "self.k_segments[:, None, :] >= -self.q_segments[:, :, None]",
        ("tests/test_model.py", "tests/test_attention.py"),
    ),
    Mutant(
        "scores-not-scaled",
        "llama_jax/attention.py",
        "attention scores are divided by H instead of sqrt(H)",
        "scores / math.sqrt(q.shape[-1])",
        "scores / q.shape[-1]",
        ("tests/test_attention.py",),
    ),
    Mutant(
        "window-one-too-long",
        "llama_jax/attention.py",
        "a sliding window has one key more",
        "self.k_positions[:, None, :] < window",
        "self.k_positions[:, None, :] <= window",
        ("tests/test_window.py",),
    ),
    Mutant(
        "beam-window-of-other-beams",
        "llama_jax/attention.py",
        "the window of a beam is that of its row",
        "allowed = allowed & (count <= layout.window)",
        "allowed = allowed & (count <= 2 * layout.window)",
        ("tests/decoding/test_ring_cache.py",),
    ),
    Mutant(
        "padding-in-rings",
        "llama_jax/ops/ring_cache.py",
        "padding overwrites the keys of a shorter row",
        "if end is None else jnp.clip(end - start, 0, length)",
        "if True else jnp.clip(end - start, 0, length)",
        ("tests/decoding/test_ring_cache.py",),
    ),
    Mutant(
        "session-trusts-its-ring",
        "llama_jax/decoding/session.py",
        "a session takes back more than its rings keep",
        "self._written = max(self._written, len(cached_tokens))",
        "self._written = len(cached_tokens)",
        ("tests/decoding/test_ring_cache.py",),
    ),
    Mutant(
        "cache-write-off-by-one",
        "llama_jax/kv_cache.py",
        "new keys and values are written one slot too far",
        "write_slices(slots, new, start), cache, stored)",
        "write_slices(slots, new, start + 1), cache, stored)",
        ("tests/decoding/test_generation.py",),
    ),
    Mutant(
        "int8-cache-scale",
        "llama_jax/kv_cache.py",
        "an int8 cache's scale is a quarter too small, so large values overflow",
        "axis=-1) / (448 if fp8 else 127)",
        "axis=-1) / (448 if fp8 else 170)",
        ("tests/decoding/test_generation.py", "tests/ops/test_quantization.py"),
    ),
    Mutant(
        "striped-window-too-early",
        "llama_jax/ops/striped_cache.py",
        "a device writes from the slot before its first one on",
        "(start - device + stride - 1) // stride",
        "(start - device) // stride",
        ("tests/ops/test_striped_cache.py",),
    ),
    Mutant(
        "partial-softmax-not-rescaled",
        "llama_jax/ops/striped_cache.py",
        "partial softmaxes are added with a maximum each",
        'weight = jnp.exp(row_max - jax.lax.pmax(row_max, "context"))',
        'weight = jnp.exp(0 * (row_max - jax.lax.pmax(row_max, "context")))',
        ("tests/ops/test_striped_cache.py",),
    ),
    Mutant(
        "norm-eps-outside-root",
        "llama_jax/layers.py",
        "RMSNorm subtracts the mean",
        "y = x.astype(jnp.float32)\n",
        "y = x.astype(jnp.float32) - x.astype(jnp.float32).mean(-1, keepdims=True)\n",
        ("tests/test_model.py", "tests/test_golden.py"),
    ),
    Mutant(
        "loss-segment-boundary",
        "llama_jax/loss.py",
        "a document's last token is trained to predict the next document's first",
        "return jnp.where(_gather_context(segment_ids) == shift_left(segment_ids), weights, 0.0)",
        "return jnp.where(_gather_context(segment_ids) <= shift_left(segment_ids), weights, 0.0)",
        ("tests/test_loss.py", "tests/test_golden.py"),
    ),
    Mutant(
        "z-loss-not-squared",
        "llama_jax/loss.py",
        "z-loss uses log Z instead of log^2 Z",
        "z_loss * log_z**2",
        "z_loss * log_z",
        ("tests/test_loss.py",),
    ),
    Mutant(
        "spec-down-unsharded",
        "llama_jax/sharding.py",
        "the down projection is replicated over fsdp",
        'DOWN_FD = P("tensor", PARAMS)',
        'DOWN_FD = P("tensor", None)',
        ("tests/test_sharding.py", "tests/train/test_step.py"),
    ),
    # ops
    Mutant(
        "reduce-scatter-skips-data",
        "llama_jax/ops/gradient_sums.py",
        "gradients are not summed over the data axis",
        'jax.lax.psum(g[0].astype(dtype), "data").astype(g.dtype)',
        "g[0].astype(dtype).astype(g.dtype)",
        ("tests/train/test_step.py",),
    ),
    Mutant(
        "swiglu-gradient",
        "llama_jax/ops/swiglu.py",
        "SiLU's derivative lacks a term",
        "d_y * up * (sigmoid + silu * (1 - sigmoid))",
        "d_y * up * sigmoid",
        ("tests/ops/test_linear.py",),
    ),
    Mutant(
        "fused-loss-gradient-unweighted",
        "llama_jax/ops/fused_cross_entropy.py",
        "the gradient of the logits ignores the loss mask",
        "jnp.where(is_target, weights[..., None], 0.0)",
        "jnp.where(is_target, 1.0, 0.0)",
        ("tests/ops/test_fused_cross_entropy.py",),
    ),
    Mutant(
        "divergence-top-k-of-the-shard",
        "llama_jax/ops/fused_divergence.py",
        "the teacher's top k are those of one device's shard of the vocabulary",
        "values, ids = shard.concatenate(values), shard.concatenate(ids + shard.first_id)",
        "values, ids = shard.concatenate(values), ids + shard.first_id",
        ("tests/ops/test_fused_divergence.py",),
    ),
    Mutant(
        "int4-minimum-dropped",
        "llama_jax/ops/quantization.py",
        "4-bit groups lose their offset",
        "(groups * scale + minimum)",
        "(groups * scale)",
        ("tests/ops/test_quantization.py",),
    ),
    # decoding
    Mutant(
        "top-p-keeps-too-few",
        "llama_jax/decoding/sampling.py",
        "nucleus sampling drops the token that reaches p",
        "return jnp.where((probabilities >= threshold[:, None]) | (p >= 1)[:, None], logits, -jnp.inf)",
        "return jnp.where((probabilities > threshold[:, None]) | (p >= 1)[:, None], logits, -jnp.inf)",
        ("tests/decoding/test_sampling.py",),
    ),
    Mutant(
        "repetition-penalty-sign",
        "llama_jax/decoding/logits_processors.py",
        "the repetition penalty makes negative logits larger",
        "jnp.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])",
        "logits / penalty[:, None]",
        ("tests/decoding/test_logits_processors.py",),
    ),
    Mutant(
        "limit-off-by-one",
        "llama_jax/decoding/state.py",
        "generation stops one token late",
        "(lengths >= state.limit)",
        "(lengths > state.limit)",
        ("tests/decoding/test_generation.py",),
    ),
    Mutant(
        "end-token-of-one-row-ends-all",
        "llama_jax/decoding/state.py",
        "a row that is done keeps sampling",
        "done=state.done | (live & ends)",
        "done=live & ends",
        ("tests/decoding/test_generation.py",),
    ),
    Mutant(
        "beam-length-penalty",
        "llama_jax/decoding/beam_hypotheses.py",
        "scores are multiplied by the length penalty instead of divided",
        "return total / length.astype(jnp.float32) ** length_penalty[:, None]",
        "return total * length.astype(jnp.float32) ** length_penalty[:, None]",
        ("tests/decoding/test_beam_search.py",),
    ),
    Mutant(
        "speculative-acceptance",
        "llama_jax/decoding/speculative.py",
        "every draft is accepted, so the distribution is the draft model's",
        "jnp.where(uniform * q < p, draft,",
        "jnp.where(uniform * q < p + 1, draft,",
        ("tests/decoding/test_speculative.py",),
    ),
    Mutant(
        "grammar-ends-anywhere",
        "llama_jax/decoding/constraints.py",
        "the end token is allowed in every state of a grammar",
        "may_end = (alive & _take(grammars.accepting, constraint.index, constraint.state))",
        "may_end = alive",
        ("tests/decoding/test_constraints.py",),
    ),
    Mutant(
        "grammar-advances-rows-at-rest",
        "llama_jax/decoding/constraints.py",
        "a row's state moves on though it takes no token",
        "moves = live & (constraint.index != FREE)",
        "moves = (constraint.index != FREE)",
        ("tests/decoding/test_constraints.py",),
    ),
    Mutant(
        "grammar-beams-keep-their-states",
        "llama_jax/decoding/beam_search.py",
        "the states of beams are not reordered with them",
        "at = gather_beams(constraint.state, selected.parent)",
        "at = constraint.state",
        ("tests/decoding/test_constraints.py",),
    ),
    Mutant(
        "grammar-space-at-the-start",
        "llama_jax/structured_output/vocabulary.py",
        "SentencePiece's space before the first token counts as text",
        "piece[id in table.space_prefixed :]",
        "piece[0:]",
        ("tests/structured_output/test_vocabularies.py",),
    ),
    # adapters
    Mutant(
        "lora-scale",
        "llama_jax/adapters/lora.py",
        "rsLoRA's scaling for plain LoRA and the reverse",
        "self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)",
        "self.alpha / (self.rank if self.rslora else math.sqrt(self.rank))",
        ("tests/weights/test_peft.py", "tests/adapters/test_lora.py"),
    ),
    Mutant(
        "prefix-shape-unchecked",
        "llama_jax/adapters/prefix.py",
        "keys of a prefix are computed one position late",
        "forward_cached(config, params, tokens, jnp.zeros(batch, jnp.int32), cache)",
        "forward_cached(config, params, tokens, jnp.ones(batch, jnp.int32), cache)",
        ("tests/adapters/test_prefix.py",),
    ),
    # weights
    Mutant(
        "rotary-permutation-inverse",
        "llama_jax/weights/names.py",
        "queries and keys are permuted the wrong way between formats",
        "pairs = (2, x.shape[-1] // 2) if inverse else (x.shape[-1] // 2, 2)",
        "pairs = (x.shape[-1] // 2, 2) if inverse else (2, x.shape[-1] // 2)",
        ("tests/weights/test_gguf.py", "tests/weights/test_meta.py"),
    ),
    Mutant(
        "checksum-skipped",
        "llama_jax/weights/manifest.py",
        "a file's checksum is not compared",
        ".hexdigest() != entry.sha256:",
        ".hexdigest() == '':",
        ("tests/weights/test_manifest.py",),
    ),
    Mutant(
        "overlap-unchecked",
        "llama_jax/weights/source.py",
        "overlapping tensors of a file are accepted",
        "if begin < last_end:",
        "if begin < 0:",
        ("tests/weights/test_hf.py", "tests/weights/test_gguf.py"),
    ),
    Mutant(
        "peft-padding",
        "llama_jax/weights/peft.py",
        "modules with a scale of their own lose it",
        "module.scale / settings.scale",
        "settings.scale / settings.scale",
        ("tests/weights/test_peft.py",),
    ),
    # tokenizer, chat, text, hub
    Mutant(
        "bos-twice",
        "llama_jax/tokenizer/base.py",
        "BOS is prepended to a text that begins with it",
        "if ids[: len(prefix)] != prefix:",
        "if ids[: len(prefix)] != []:",
        ("tests/tokenizer", "tests/chat"),
    ),
    Mutant(
        "stop-string-kept",
        "llama_jax/text/stop_strings.py",
        "the text that is returned includes the stop string",
        "return pending[: end - completed], True",
        "return pending[:end], True",
        ("tests/text/test_stop_strings.py",),
    ),
    Mutant(
        "download-unverified",
        "llama_jax/hub/known.py",
        "a downloaded file's checksum is not compared",
        "    ) from error\n    if digest.hexdigest() != model.sha256:",
        "    ) from error\n    if digest.hexdigest() == model.name:",
        ("tests/hub/test_known.py",),
    ),
    # train
    Mutant(
        "accumulation-unweighted",
        "train/step.py",
        "gradients are divided by the number of rows instead of by the number of tokens",
        "scale = 1 / count\n",
        "scale = 1 / jnp.float32(batch['tokens'].shape[0])\n",
        ("tests/train/test_step.py",),
    ),
    Mutant(
        "clip-is-off",
        "train/step.py",
        "gradients are never clipped",
        "scale *= jnp.minimum(1.0, max_grad_norm / jnp.maximum(norm, 1e-12))",
        "scale *= jnp.maximum(1.0, max_grad_norm / jnp.maximum(norm, 1e-12))",
        ("tests/train/test_step.py",),
    ),
    Mutant(
        "warmup-from-zero",
        "train/optimizer.py",
        "the first step's learning rate is 0",
        "ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))",
        "ramp = optax.linear_schedule(0.0, peak, max(warmup - 1, 1))",
        ("tests/train/test_optimizer.py",),
    ),
    Mutant(
        "dpo-sign",
        "train/objectives/preference.py",
        "DPO prefers the rejected answer",
        "margin = beta * (chosen - rejected)",
        "margin = beta * (rejected - chosen)",
        ("tests/train/test_objectives.py",),
    ),
    Mutant(
        "simpo-gamma-sign",
        "train/objectives/reference_free.py",
        "SimPO is content with a negative margin",
        "margin = beta * (chosen - rejected) - gamma",
        "margin = beta * (chosen - rejected) + gamma",
        ("tests/train/test_objectives.py",),
    ),
    Mutant(
        "kto-kl-sign",
        "train/objectives/kto.py",
        "KTO's KL estimate moves the reference point of the rewards the wrong way",
        "signed = jnp.where(desirable, gain - kl, kl - gain)",
        "signed = jnp.where(desirable, gain + kl, -kl - gain)",
        ("tests/train/test_objectives.py",),
    ),
    Mutant(
        "ranking-margin-sign",
        "train/objectives/heads.py",
        "a larger margin asks for less difference between the rewards",
        "return -jax.nn.log_sigmoid(chosen - rejected - margin)",
        "return -jax.nn.log_sigmoid(chosen - rejected + margin)",
        ("tests/train/test_objectives.py",),
    ),
    Mutant(
        "ratio-inverted",
        "train/objectives/policy.py",
        "policy optimization clips the inverse of its ratios",
        "log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)",
        "log_ratio = jnp.where(mask, old_logprobs - logprobs, 0.0)",
        ("tests/train/test_policy.py",),
    ),
    Mutant(
        "value-loss-not-held",
        "train/objectives/ppo.py",
        "a value may move away from its target without bound",
        "return jnp.maximum(plain, held) / 2, held > plain",
        "return jnp.minimum(plain, held) / 2, held > plain",
        ("tests/train/test_ppo.py",),
    ),
    Mutant(
        "advantages-not-discounted",
        "train/rl/advantages.py",
        "generalized advantages forget the discount",
        "error + gamma * gae_lambda * following",
        "error + gae_lambda * following",
        ("tests/train/test_policy.py",),
    ),
    Mutant(
        "packed-positions",
        "train/data/packing.py",
        "positions do not restart in each packed example",
        'row["positions"][offset:end] = np.arange(len(segment))',
        'row["positions"][offset:end] = np.arange(offset, end)',
        ("tests/train/data/test_packing.py",),
    ),
    Mutant(
        "validation-leaks",
        "train/data/splitting.py",
        "the validation set is empty and its records are trained on",
        "chunks.append(start + np.flatnonzero(keys < threshold))",
        "chunks.append(start + np.flatnonzero(keys < 0))",
        ("tests/train/data/test_validation.py",),
    ),
    Mutant(
        "feed-rows-swapped",
        "train/feed.py",
        "a device is fed another device's rows",
        "local_row = {start: i * rows for i, start in enumerate(local)}",
        "local_row = {start: 0 for i, start in enumerate(local)}",
        ("tests/train/test_feed.py",),
    ),
    Mutant(
        "flops-not-causal",
        "llama_jax/plan/flops.py",
        "MFU counts the masked half of attention",
        "window / (2 * seq_len) if causal else 1.0",
        "0 * window if causal else 1.0",
        ("tests/plan/test_flops.py",),
    ),
    Mutant(
        "peak-of-one-device",
        "train/metrics/peak_flops.py",
        "MFU divides by the peak of one device",
        "return peak * jax.device_count()",
        "return peak",
        ("tests/train/test_peak_flops.py",),
    ),
    Mutant(
        "ema-weights-swapped",
        "train/step.py",
        "the averaged weights follow the newest step",
        "decay * old + (1 - decay) * new",
        "(1 - decay) * old + decay * new",
        ("tests/train/test_objectives.py", "tests/train/test_step.py"),
    ),
    Mutant(
        "error-status",
        "llama_jax/console/exit_status.py",
        "bad input exits with status 1",
        "    return ExitStatus.BAD_INPUT\n",
        "    return 1\n",
        ("tests/cli/test_cli.py",),
    ),
    Mutant(
        "agreed-too-early",
        "train/coordination.py",
        "processes of a run stop after different steps",
        "return max(map(int, counts.values()))",
        "return min(map(int, counts.values()))",
        ("tests/train/test_coordination.py",),
    ),
    # Serving.
    Mutant(
        "prefix-off-by-one",
        "llama_jax/serving/engine.py",
        "a row is thought to hold its newest token, which was not run",
        "self._held.append(row, self._newest[row])",
        "self._held.append(row, token.id)",
        ("tests/serving/test_batcher.py::test_a_shared_prefix_is_copied_and_changes_nothing",),
    ),
    Mutant(
        "slots-of-the-shortest-row",
        "llama_jax/serving/programs.py",
        "rows attend to no more slots than the shortest of them has",
        "used = jnp.max(jnp.where(live, history.length, 1))",
        "used = jnp.min(jnp.where(live, history.length, 999))",
        ("tests/serving/test_batcher.py::test_rows_that_join_and_leave_at_random_equal_generate",),
    ),
    Mutant(
        "one-key-for-all-continuations",
        "llama_jax/serving/programs.py",
        "the continuations of a prompt are all the first one",
        "jax.random.fold_in(key, index)",
        "jax.random.fold_in(key, 0)",
        ("tests/serving/test_batcher.py::test_continuations_of_one_prompt_equal_those_of_generate",),
    ),
    Mutant(
        "logprobs-of-the-stop-string",
        "llama_jax/serving/text_stream.py",
        "the log-probabilities include a token of the stop string",
        "entry[1] < self._released",
        "entry[1] <= self._released",
        ("tests/serving/test_text_stream.py",),
    ),
)
