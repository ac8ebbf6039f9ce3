"""What Hugging Face's files beside a tokenizer say of it: token roles, the BOS rule, the chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import Roles
from llama_jax.tokenizer.files import parse_json_object, read_bytes

_ROLES = ("bos", "eos", "unk", "pad")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings beside a tokenizer file; everything is None or empty where no file speaks.

    Attributes:
      names: role (`bos`, `eos`, `unk`, `pad`) to the token's spelling, and the file that says so.
      ids: `bos` or `eos` to ids from generation_config.json or config.json, which know ids alone.
      add_bos: whether BOS comes first.
      chat_template: Jinja source.
    """

    names: Mapping[str, tuple[str, Path]]
    ids: Mapping[str, tuple[int, ...]]
    add_bos: bool | None
    chat_template: str | None

    def apply(self, roles: Roles, vocabulary: Mapping[str, int]) -> Roles:
        """Returns `roles` with what these settings say put over them.

        Args:
          roles: what the vocabulary itself says.
          vocabulary: the tokens that may have a role, spelling to id.

        Raises:
          TokenizerError: if BOS or EOS is a token that the vocabulary lacks.
        """
        found: dict[str, int] = {}
        for role in _ROLES:
            if role in self.names:
                name, path = self.names[role]
                if name in vocabulary:
                    found[role] = vocabulary[name]
                elif role in ("bos", "eos"):
                    raise TokenizerError(
                        f"{path}: {role}_token is {name[:40]!r}, which the vocabulary beside it lacks; "
                        "take both files from the same model"
                    )
            elif role in self.ids and getattr(roles, f"{role}_id") is None:
                found[role] = self.ids[role][0]
        return dataclasses.replace(
            roles,
            **{f"{role}_id": token for role, token in found.items()},
            eos_ids=(*roles.eos_ids, *self.ids.get("eos", ())),
            add_bos=roles.add_bos if self.add_bos is None else self.add_bos,
            chat_template=self.chat_template or roles.chat_template,
        )


def beside(path: Path) -> Settings:
    """Reads the settings files in the directory of `path`; those that are absent say nothing.

    Raises:
      TokenizerError: if one is there but is not a JSON object, or a setting has the wrong type.
    """
    files = {
        name: _read(path.with_name(f"{name}.json"))
        for name in ("tokenizer_config", "special_tokens_map", "generation_config", "config")
    }
    names: dict[str, tuple[str, Path]] = {}
    ids: dict[str, tuple[int, ...]] = {}
    for role in _ROLES:
        for name in ("tokenizer_config", "special_tokens_map"):
            token = files[name].get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names.setdefault(role, (token, path.with_name(f"{name}.json")))
    for role in ("bos", "eos"):
        for name in ("generation_config", "config"):
            values = files[name].get(f"{role}_token_id")
            values = values if isinstance(values, list) else [] if values is None else [values]
            if not all(type(value) is int for value in values):
                raise TokenizerError(
                    f"{path.with_name(f'{name}.json')}: {role}_token_id is {str(values)[:60]}; it must be a "
                    "whole number or a list of them"
                )
            if values:
                ids.setdefault(role, tuple(values))
    add_bos = files["tokenizer_config"].get("add_bos_token")
    return Settings(names, ids, add_bos if isinstance(add_bos, bool) else None, _chat_template(path, files))


def _chat_template(path: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    template = files["tokenizer_config"].get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if isinstance(template, str):
        return template
    jinja = path.with_name("chat_template.jinja")
    try:
        return read_bytes(jinja).decode() if jinja.is_file() else None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{jinja} is not UTF-8 ({error.reason}); take a fresh copy") from None


def _read(path: Path) -> dict[str, Any]:
    return parse_json_object(path, read_bytes(path)) if path.is_file() else {}
