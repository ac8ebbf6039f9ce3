"""The models, prompts and settings behind the beam search golden: twenty small models, and SmolLM2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

import llama_jax as lj
from llama_jax.decoding.beam_hypotheses import BeamSearchOutput
from llama_jax.decoding.beam_search import EarlyStopping, beam_search
from tests.golden import cases

BEAMS = cases.GOLDEN / "beams.npz"
MODELS = tuple(range(20))
PROMPT_LENGTHS = np.array([9, 4], np.int32)
NEW_TOKENS = 12
# A score adds up as many log-probabilities as the text is long, of logits up to about 30.
TOLERANCE = 1e-4

SMOLLM2_PROMPTS = (0, 2, 4)
SMOLLM2_NEW_TOKENS = 16

# Seeds of `cases.random_case`, for their configurations: every scaling but NTK, which transformers has no
# static form of; multi-query, grouped and multi-head; and no more than two layers, to compile fast.
_SHAPES = (0, 6, 13, 24, 18)
_LENGTH_PENALTIES = (1.0, 0.0, 2.0, -0.5)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is asked of both sides; the fields of `sampling` have the same names in transformers."""

    num_beams: int
    early_stopping: EarlyStopping
    length_penalty: float
    eos_ids: tuple[int, ...]
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Token 30 is a full stop. As many beams in each: one program of 30 layers serves all.
SMOLLM2_SETTINGS = (
    Setting(4, False, 1.0, ()),
    Setting(4, "never", 1.5, (30,), {"no_repeat_ngram_size": 3}),
    Setting(4, True, 0.5, (30, 28), {"repetition_penalty": 1.2, "min_new_tokens": 8}),
)


def num_beams(model: int) -> int:
    """2 to 5, the same for all models of a shape."""
    return 2 + model % len(_SHAPES) % 4


def small_model(model: int) -> tuple[lj.LlamaConfig, dict[str, Any], np.ndarray]:
    """A model whose logits are far apart, and two prompts for it, padded on the right with zeros."""
    config = cases.random_case(_SHAPES[model % len(_SHAPES)]).config
    draw = cases.Draw(1000 + model)
    params = cases.random_params(config, draw)
    params["final_norm"]["scale"] *= draw.pick(4, 6, 8) * (2 if config.tie_word_embeddings else 1)
    tokens = draw.integers(0, config.vocab_size, 2 * 9).reshape(2, 9)
    return config, params, np.where(np.arange(9) < PROMPT_LENGTHS[:, None], tokens, 0)


def settings(model: int, eos_ids: tuple[int, ...], common: tuple[int, ...]) -> tuple[Setting, ...]:
    """Every way to stop with every length penalty once in four models, and the rules.

    Args:
      model: its number.
      eos_ids: tokens that its free continuations meet.
      common: tokens that they often hold.
    """

    def penalty(which: int) -> float:
        return _LENGTH_PENALTIES[(model + which) % 4]

    beams = num_beams(model)
    return (
        Setting(beams, False, penalty(0), ()),
        Setting(beams, False, penalty(1), eos_ids),
        Setting(beams, True, penalty(2), eos_ids),
        Setting(beams, "never", penalty(3), eos_ids),
        Setting(beams, True, penalty(0), eos_ids, {"repetition_penalty": 1.3, "min_new_tokens": 5}),
        Setting(beams, "never", penalty(1), eos_ids, {"no_repeat_ngram_size": 2}),
        Setting(beams, False, penalty(2), eos_ids, {"repetition_penalty": 0.8, "suppress_tokens": common}),
    )


def run(
    config: lj.LlamaConfig,
    params: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    setting: Setting,
    max_new_tokens: int,
) -> BeamSearchOutput:
    """Every text of `beam_search` under a setting, as numpy arrays."""
    found = beam_search(
        config,
        params,
        tokens,
        lengths,
        setting.num_beams,
        max_new_tokens=max_new_tokens,
        eos_id=setting.eos_ids,
        length_penalty=setting.length_penalty,
        early_stopping=setting.early_stopping,
        num_return_sequences=setting.num_beams,
        sampling=lj.Sampling(**setting.sampling),
    )
    return BeamSearchOutput(
        tokens=np.asarray(found.tokens),
        lengths=np.asarray(found.lengths),
        scores=np.asarray(found.scores),
        logprobs=np.asarray(found.logprobs),
    )
