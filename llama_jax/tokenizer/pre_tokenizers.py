"""The pre-tokenizers of byte-level BPE vocabularies, by their names in GGUF files (`tokenizer.ggml.pre`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tokenizers import Regex, normalizers, pre_tokenizers


class PreTokenizer(NamedTuple):
    """The pre-tokenization of a byte-level BPE vocabulary.

    Attributes:
      build: builds the pre-tokenizer, whose last step is `ByteLevel`.
      normalizer: builds the normalizer, applied first; or None.
      ignore_merges: whether a word that is a piece becomes that piece regardless of the merges.
      add_bos: whether vocabularies of this kind prepend BOS by default.
    """

    build: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    return build


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s+(?!\S)|\s+"
_REST = rf"{_SYMBOLS}[\r\n]*|\s*[\r\n]+|{_SPACES}"
_GPT2 = rf"'(?:s|t|re|ve|m|ll|d)| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_DIGITS_3, _CJK = r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


def _cased_words(suffix: str, digits: str, symbols: str = _SYMBOLS) -> str:
    """Words split where lower case is followed by upper case, as in GPT-4o's vocabulary."""
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{word}{_UPPER}*{_LOWER}+{suffix}|{word}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        rf"|{symbols}[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


_GPT4O = PreTokenizer(_split(_cased_words(f"{_CONTRACTIONS}?", _DIGITS_3)))
_LLAMA = PreTokenizer(_split(_LLAMA3), ignore_merges=True, add_bos=True)
_LLAMA_MERGES = PreTokenizer(_split(_LLAMA3))
_SINGLE_DIGITS = PreTokenizer(_single_digits)
_PLAIN = PreTokenizer(_gpt2)
_SINGLE_DIGIT_WORDS = PreTokenizer(_split(_QWEN2))
_QWEN = PreTokenizer(_split(_QWEN2), normalizer=normalizers.NFC)
_DEEPSEEK3_LLM = PreTokenizer(_split(_DIGITS_3, _CJK, rf"{_DEEPSEEK3}[\r\n]*|\s*[\r\n]+|{_SPACES}"))
_BLOOM_WORDS = PreTokenizer(_split(_BLOOM))
_BAILING = (
    rf"'(?i:[sdmt]|ll|ve|re)|{_WORDS}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|{_SPACES}"  # one newline at a time
)
_LONG_SPACES = "|".join(rf"\s{{{1 << power}}}(?!\S)" for power in range(9, 1, -1))


# The names are llama.cpp's (src/llama-vocab.cpp); each entry is the pre-tokenizer in the tokenizer.json of
# the models that the name stands for. `default`, for files without the key, is llama.cpp's own. Of equal
# entries the first is the one that is written.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer(_split(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA,
    "llama-v3": _LLAMA,
    "llama3": _LLAMA,
    "qwen2": _QWEN,
    **dict.fromkeys(("falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"), _LLAMA),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA_MERGES),
    **dict.fromkeys(("command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _SINGLE_DIGITS),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), _PLAIN),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "modern-bert"), _PLAIN),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), _QWEN),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open", "grok-2"), _SINGLE_DIGIT_WORDS),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3_LLM),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _BLOOM_WORDS),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), PreTokenizer(_split(_BAILING))),
    "viking": PreTokenizer(_split(_BLOOM, r"\p{N}")),
    "falcon": PreTokenizer(_split(r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "tekken": PreTokenizer(_split(_cased_words("", r"\p{N}")), ignore_merges=True, add_bos=True),
    "deepseek-llm": PreTokenizer(
        _split(
            "[\r\n]",
            r"\s?[[\p{Lu}\p{Ll}\p{Lt}]&&[^\u10d0-\u10ff]]+",
            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(_split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")),
    "seed-coder": PreTokenizer(
        _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}")
    ),
    "qwen35": PreTokenizer(
        _split(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
        )
    ),
    "jais-2": PreTokenizer(
        _split(
            rf"{_CONTRACTIONS}|{_WORDS}|{_DIGITS_3}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|{_LONG_SPACES}"
            r"|\s{1,2}(?!\S)|\s{1}"
        )
    ),
    "minicpm5": PreTokenizer(
        _split(_DIGITS_3, rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_REST}"), ignore_merges=True
    ),
    "superbpe": PreTokenizer(_split(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "laguna": PreTokenizer(_split(r"[^\n]+|[\n]+", _QWEN2)),
    "exaone-moe": PreTokenizer(
        _split(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"|{_SYMBOLS}[\r\n/]?|\s*[\r\n]|{_SPACES}"
        )
    ),
}
