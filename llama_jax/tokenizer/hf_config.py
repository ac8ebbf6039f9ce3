"""Hugging Face's configuration files next to a tokenizer: special tokens, BOS rule, chat template."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import TokenizerSettings
from llama_jax.tokenizer.files import parse_json_object, read_bytes

TOOL_USE = "additional_chat_templates/tool_use.jinja"  # beside chat_template.jinja
_SPECIAL_TOKENS = ("bos", "eos", "unk", "pad")


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """The settings of the files next to a tokenizer; None or empty if no file has them.

    Attributes:
      tokens: `bos`, `eos`, `unk` or `pad` to the token, and the file that defines it.
      ids: `bos` or `eos` to ids, from generation_config.json or config.json, which have only ids.
      add_bos, add_eos: whether to prepend BOS, to append EOS.
      add_prefix_space: whether to prepend a space to every text.
      tokenizer_class: transformers' class.
      chat_template: Jinja source.
      added: tokens that were added to a vocabulary by id, with whether they are control tokens.
    """

    tokens: Mapping[str, tuple[str, Path]]
    ids: Mapping[str, tuple[int, ...]]
    add_bos: bool | None
    add_eos: bool | None
    add_prefix_space: bool | None
    tokenizer_class: str
    chat_template: str | None
    added: Mapping[int, tuple[str, bool]]

    def apply(
        self, settings: TokenizerSettings, vocabulary: Mapping[str, int], vocab_size: int
    ) -> TokenizerSettings:
        """Overrides `settings`, which comes from the vocabulary file, with these settings.

        Args:
          settings: the settings of the vocabulary file.
          vocabulary: the tokens that may be special tokens, with their ids.
          vocab_size: number of ids; larger ones in generation_config.json and config.json are ignored, as no
            model produces them.

        Raises:
          TokenizerError: if BOS or EOS is not in the vocabulary.
        """
        ids: dict[str, int] = {}
        known = {name: [id for id in found if id < vocab_size] for name, found in self.ids.items()}
        for name in _SPECIAL_TOKENS:
            if name in self.tokens:
                token, path = self.tokens[name]
                if token in vocabulary:
                    ids[name] = vocabulary[token]
                elif name in ("bos", "eos"):
                    raise TokenizerError(
                        f"{path}: {name}_token is {token[:40]!r}, which is not in the vocabulary next to it; "
                        "take both files from the same model"
                    )
            elif known.get(name) and getattr(settings, f"{name}_id") is None:
                ids[name] = known[name][0]
        changes: dict[str, Any] = {f"{name}_id": token_id for name, token_id in ids.items()}
        eos_id = changes.get("eos_id", settings.eos_id)
        return dataclasses.replace(
            settings,
            **changes,
            suffix_ids=(eos_id,) if self.add_eos and eos_id is not None else settings.suffix_ids,
            eos_ids=(*settings.eos_ids, *known.get("eos", ())),
            add_bos=settings.add_bos if self.add_bos is None else self.add_bos,
            chat_template=self.chat_template or settings.chat_template,
        )


def read_hf_config(path: Path) -> HFConfig:
    """Reads the configuration files in the directory of `path`; each may be absent.

    Raises:
      TokenizerError: if a file is not a JSON object, or a setting has the wrong type.
    """
    files = {
        name: _read(path.with_name(f"{name}.json"))
        for name in ("tokenizer_config", "special_tokens_map", "generation_config", "config")
    }
    tokens: dict[str, tuple[str, Path]] = {}
    ids: dict[str, tuple[int, ...]] = {}
    for name in _SPECIAL_TOKENS:
        for file in ("tokenizer_config", "special_tokens_map"):
            token = files[file].get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens.setdefault(name, (token, path.with_name(f"{file}.json")))
    for name in ("bos", "eos"):
        for file in ("generation_config", "config"):
            values = files[file].get(f"{name}_token_id")
            values = values if isinstance(values, list) else [] if values is None else [values]
            if not all(type(value) is int for value in values):
                raise TokenizerError(
                    f"{path.with_name(f'{file}.json')}: {name}_token_id is {str(values)[:60]}; it must be an "
                    "integer or a list of integers"
                )
            if values:
                ids.setdefault(name, tuple(values))

    def flag(name: str) -> bool | None:
        value = files["tokenizer_config"].get(name)
        return value if isinstance(value, bool) else None

    return HFConfig(
        tokens,
        ids,
        flag("add_bos_token"),
        flag("add_eos_token"),
        flag("add_prefix_space"),
        str(files["tokenizer_config"].get("tokenizer_class")),
        _chat_template(path, files),
        _added_tokens(path, files, {token for token, _ in tokens.values()}),
    )


def _added_tokens(
    path: Path, files: Mapping[str, Mapping[str, Any]], special: set[str]
) -> dict[int, tuple[str, bool]]:
    """Reads added_tokens.json, and `added_tokens_decoder` of tokenizer_config.json, which overrides it.

    As in transformers, the tokens of the former are control tokens if the special tokens name them.
    """
    for file in ("tokenizer_config", "special_tokens_map"):
        others = files[file].get("additional_special_tokens") or []
        entries = others if isinstance(others, list) else []
        special |= {str(entry.get("content") if isinstance(entry, dict) else entry) for entry in entries}
    names = _read(path.with_name("added_tokens.json"))
    decoder = files["tokenizer_config"].get("added_tokens_decoder") or {}
    added: dict[int, tuple[str, bool]] = {}
    try:
        for name, token in names.items():
            added[operator.index(token)] = name, name in special
        for token, entry in decoder.items():
            added[int(token)] = str(entry["content"]), bool(entry.get("special", False))
    except (AttributeError, KeyError, TypeError, ValueError):
        file = "tokenizer_config.json" if len(added) >= len(names) else "added_tokens.json"
        raise TokenizerError(
            f"{path.with_name(file)}: its added tokens are not names with ids; take a fresh copy"
        ) from None
    return added


def _chat_template(path: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the template: chat_template.jinja overrides tokenizer_config.json, as in transformers.

    Of several named ones it is `default`, with `tool_use` for conversations with tools.
    """
    default = _read_template(path.with_name("chat_template.jinja"))
    if default is not None:
        return _with_tool_use(default, _read_template(path.parent / TOOL_USE))
    template = files["tokenizer_config"].get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        default, tool_use = named.get("default"), named.get("tool_use")
        template = _with_tool_use(default, tool_use) if isinstance(default, str) else None
    return template if isinstance(template, str) else None


def _read_template(path: Path) -> str | None:
    try:
        return read_bytes(path).decode() if path.is_file() else None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 ({error.reason}); take a fresh copy") from None


def _with_tool_use(default: str, tool_use: object) -> str:
    """One template of both: `tool_use` where there are tools, as transformers chooses."""
    if not isinstance(tool_use, str):
        return default
    # Jinja drops a newline at the end of a template, and one after a block's tag.
    inner, other = (source.removesuffix("\n") for source in (tool_use, default))
    return "{% if tools %}{{ '' }}" + inner + "{% else %}{{ '' }}" + other + "{% endif %}"


def _read(path: Path) -> dict[str, Any]:
    return parse_json_object(path, read_bytes(path)) if path.is_file() else {}
