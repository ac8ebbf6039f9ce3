"""The programs that checkpoints are compared with: transformers, PEFT, llama.cpp and sentencepiece."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers

from llama_jax.config import LlamaConfig
from tests.parity import hf

Messages = list[dict[str, Any]]


@dataclasses.dataclass
class Reference:
    """What another program says of a checkpoint.

    Attributes:
      program: its name, for the table.
      model: transformers' (or PEFT's) model, in f32.
      encode: the ids of a text, with what the program puts before and after it.
      decode: the text of ids, control tokens left out.
      chat: the ids of a conversation and the header of its answer, or None if there is no template.
      parses_special: whether it takes control tokens in a text for such.
    """

    program: str
    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    chat: Callable[[Messages], list[int]] | None = None
    parses_special: bool = True

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """f32 [T, V]."""
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The greedy continuation, without the end token of the checkpoint's generation settings."""
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        new = out[0, len(ids) :].tolist()
        ends = self.model.generation_config.eos_token_id
        return new[:-1] if new[-1] in (ends if isinstance(ends, list) else [ends]) else new


def from_transformers(folder: Path, **fields: Any) -> Reference:
    """The Auto classes of transformers; `fields` override."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def chat(messages: Messages) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    values = {
        "program": "transformers",
        "encode": lambda text: tokenizer(text).input_ids,
        "decode": functools.partial(tokenizer.decode, skip_special_tokens=True),
        "chat": chat if tokenizer.chat_template else None,
    } | fields
    if "model" not in values:
        values["model"] = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
    return Reference(**values)


def from_tokenizers(folder: Path) -> Reference:
    """transformers' model with tokenizer.json as the tokenizers library runs it.

    transformers 5 replaces the pre-tokenizer of such a file by the one of its class, which does not know
    whether the file was legacy; transformers 4 runs the file.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return from_transformers(
        folder,
        program="tokenizers",
        encode=lambda text: tokenizer.encode(text).ids,
        decode=tokenizer.decode,
    )


def from_peft(base: Path, adapter: Path) -> Reference:
    """PEFT's model of an adapter on transformers' base; the adapter's tokenizer if it has one."""
    import peft

    tokenizer = adapter if (adapter / "tokenizer_config.json").exists() else base
    rows = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows > model.config.vocab_size:  # tokens added for the adapter, as its user does
        model.resize_token_embeddings(rows)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return from_transformers(tokenizer, program="PEFT", model=model)


def from_sentencepiece(folder: Path) -> Reference:
    """transformers' model with sentencepiece's own ids, after BOS."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Reference(
        "sentencepiece",
        model,
        lambda text: [pieces.bos_id(), *pieces.encode(text)],
        pieces.decode,
        parses_special=False,
    )


def from_llama_cpp(path: Path, config: LlamaConfig, bos: bool = True) -> Reference:
    """llama.cpp's ids; the weights as `gguf` dequantizes them, in transformers' model.

    llama.cpp itself multiplies quantized activations: its own text is compared in `test_gguf.py`.
    """
    from tests.parity.test_gguf import LlamaCpp

    server = LlamaCpp(path)
    model = hf.load_gguf(path, config)
    end = gguf.GGUFReader(path).fields["tokenizer.ggml.eos_token_id"].contents()
    model.generation_config.eos_token_id = end

    def decode(ids: list[int]) -> str:
        return str(server.ask("detokenize", tokens=ids)["content"])

    encode = functools.partial(server.encode, add_bos=True, parse_special=True)
    return Reference("llama.cpp", model, encode, decode)
