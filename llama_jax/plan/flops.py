"""FLOPs of a training step per token, for model FLOPs utilization (MFU)."""

from __future__ import annotations

from llama_jax.config import LlamaConfig


def flops_per_token(
    model: LlamaConfig, seq_len: int, *, causal: bool, frozen: bool = False, reference: bool = False
) -> float:
    """FLOPs of the forward and backward pass per token, without rematerialization.

    6 per weight of a matrix product (including the output projection, not the embedding lookup; of experts
    those that a token goes through), and 12 L N H T for attention's two products (PaLM, arXiv 2204.02311,
    appendix B), half of that if `causal`: a token attends to half of the sequence on average. Both
    conventions are in use; compare like with like. In layers with a sliding window a token attends to the
    keys in it (`attended_keys`).

    Args:
      model: the model's configuration.
      seq_len: T.
      causal: whether to count attention's masked half not at all; a window counts in any case.
      frozen: base weights are frozen under an adapter: no weight gradients, so 4 per weight instead of 6; the
        adapter's own weights are not counted.
      reference: a reference model's forward pass runs beside the policy's: 2 more per weight, and 4 L N H T.
    """
    lookup_only = model.has_output or model.labels  # a tied embedding is also the output projection
    embedding = model.vocab_size * model.hidden_size if lookup_only else 0
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    weights = model.num_active_params - embedding - norms
    products = (16 if reference else 12) * model.num_attention_heads * model.head_dim
    attention = products * attended_keys(model, seq_len, causal=causal)
    return (6 - 2 * frozen + 2 * reference) * weights + attention


def attended_keys(model: LlamaConfig, seq_len: int, *, causal: bool) -> float:
    """The keys that a token of a sequence attends to on average, summed over the layers.

    Args:
      model: the model's configuration.
      seq_len: T.
      causal: T / 2 in a layer without a window, and w - w^2 / 2T in one with a window of w. Otherwise T and
        w, as if the sequence had keys before its first token.
    """
    windows = [min(kind.window or seq_len, seq_len) for kind in model.layer_kinds]
    return sum(window * (1 - window / (2 * seq_len) if causal else 1.0) for window in windows)


def flops_by_attention(
    model: LlamaConfig,
    seq_len: int,
    *,
    frozen: bool,
    reference: bool,
    teacher: LlamaConfig | None = None,
    value_model: LlamaConfig | None = None,
) -> dict[str, float]:
    """`flops_per_token` by how attention is counted, `causal` or `full`.

    With a teacher's forward pass, and the step of a value model that is trained as the model is.
    """

    def count(causal: bool) -> float:
        own = flops_per_token(model, seq_len, causal=causal, frozen=frozen, reference=reference)
        if value_model is not None:
            own += flops_per_token(value_model, seq_len, causal=causal, frozen=frozen)
        if teacher is None:
            return own
        with_forward, without = (
            flops_per_token(teacher, seq_len, causal=causal, reference=also) for also in (True, False)
        )
        return own + with_forward - without

    return {name: count(name == "causal") for name in ("causal", "full")}
