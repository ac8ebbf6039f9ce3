"""The reference: Hugging Face transformers' Llama with our configurations and parameters in it.

The one place where names and shapes are turned into Hugging Face's. It shares no code with
`llama_jax.weights`, whose errors it is there to find.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from llama_jax.config import LlamaConfig
from tests.golden.cases import Case

transformers.logging.set_verbosity_error()


def config(ours: LlamaConfig, *, length: int | None = None) -> transformers.LlamaConfig:
    """The same model, as transformers describes it.

    transformers has no static NTK scaling, but its dynamic one raises theta, for a text of S tokens
    on a model trained for M, by (f S / M - (f - 1)) ** (H / (H - 2)). M and f are chosen here so that
    the base of that power is our factor: its own code computes the reference.

    Args:
      ours: the model.
      length: S, one more than the largest position that will be run; `ntk` alone needs it.
    """
    scaling = ours.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": ours.rope_theta}
    context = ours.max_position_embeddings
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "ntk":
        if length is None:
            raise ValueError("ntk scaling needs the number of positions that will be run")
        context = length // 2
        rope |= {"rope_type": "dynamic", "factor": (scaling.factor - 1) / (length / context - 1)}
    elif scaling is not None and scaling.kind == "yarn":
        rope |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate")}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    elif scaling is not None and scaling.kind == "llama3":
        rope |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling is not None and scaling.original_max_position_embeddings is not None:
        rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    return transformers.LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        head_dim=ours.head_dim,
        max_position_embeddings=context,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=ours.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def state_dict(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters (or their gradients) under transformers' names, as its [out, in] matrices."""
    layers = params["layers"]
    attention, feed_forward = layers["attention"], layers["feed_forward"]
    state = {"model.embed_tokens.weight": params["embed"]["embedding"]}
    for i in range(len(layers["ffn_norm"]["scale"])):
        block = {
            "input_layernorm": layers["attention_norm"]["scale"][i],
            "self_attn.q_proj": _flat(attention["wq"][i], axis=1).T,
            "self_attn.k_proj": _flat(attention["wk"][i], axis=1).T,
            "self_attn.v_proj": _flat(attention["wv"][i], axis=1).T,
            "self_attn.o_proj": _flat(attention["wo"][i], axis=0).T,
            "post_attention_layernorm": layers["ffn_norm"]["scale"][i],
            "mlp.gate_proj": feed_forward["w_gate"][i].T,
            "mlp.up_proj": feed_forward["w_up"][i].T,
            "mlp.down_proj": feed_forward["w_down"][i].T,
        }
        state |= {f"model.layers.{i}.{name}.weight": array for name, array in block.items()}
    state["model.norm.weight"] = params["final_norm"]["scale"]
    if "lm_head" in params:
        state["lm_head.weight"] = params["lm_head"]["kernel"].T
    return {name: np.ascontiguousarray(array) for name, array in state.items()}


def _flat(array: np.ndarray, *, axis: int) -> np.ndarray:
    shape = array.shape
    return array.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def model(ours: LlamaConfig, params: dict[str, Any], *, length: int | None = None) -> Any:
    """The reference model in f32, ready to run, holding `params`."""
    return _filled(config(ours, length=length), state_dict(params))


def _filled(description: transformers.LlamaConfig, state: dict[str, np.ndarray]) -> Any:
    reference = transformers.LlamaForCausalLM(description).eval()
    missing, unexpected = reference.load_state_dict(
        {name: torch.tensor(array) for name, array in state.items()}, strict=False
    )
    tied = {"lm_head.weight"} if description.tie_word_embeddings else set()
    if set(missing) != tied or unexpected:
        raise ValueError(f"transformers' model wants {missing} and does not know {unexpected}")
    return reference


def case_model(case: Case) -> Any:
    """The reference model of a case."""
    return model(case.config, case.params, length=int(case.positions.max()) + 1)


def case_logits(reference: Any, case: Case) -> torch.Tensor:
    """The reference's f32 logits [B, T, V] of a case, as part of torch's graph."""
    positions = torch.from_numpy(case.positions.astype(np.int64))
    # Without a mask and a cache transformers takes restarting positions for packed documents.
    packed = case.layout == "packed"
    mask = None if packed else torch.from_numpy(case.valid.astype(np.int64))
    tokens = torch.from_numpy(case.tokens.astype(np.int64))
    return reference(tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits


def load_gguf(path: Path, ours: LlamaConfig) -> Any:
    """The reference model with the dequantised weights of a Llama GGUF file.

    transformers reads GGUF itself where `accelerate` is installed; the result is the same arrays.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, ours.num_hidden_layers)
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    description = config(ours)
    with torch.device("meta"):
        wanted = list(transformers.LlamaForCausalLM(description).state_dict())
    state = {}
    for name in wanted:
        if name == "lm_head.weight" and ours.tie_word_embeddings:
            continue
        array = np.asarray(stored[f"{names.get_name(name.removesuffix('.weight'))}.weight"])
        for projection, heads in (
            ("q_proj", ours.num_attention_heads),
            ("k_proj", ours.num_key_value_heads),
        ):
            if projection in name:
                # GGUF rotates rows (2i, 2i + 1) of a head together, transformers (i, i + H/2).
                pairs = array.reshape(heads, ours.head_dim // 2, 2, -1)
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        state[name] = np.ascontiguousarray(array)
    return _filled(description, state)


def generate(reference: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The greedy continuation of one prompt, without an end token."""
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()
