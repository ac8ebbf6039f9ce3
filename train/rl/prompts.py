"""Prompts: records with a field `prompt`, a text or messages, whose other fields go to the reward functions.

Their order is that of other data: a function of the seed, epoch after epoch, mixed by the sources' weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.chat import ChatTemplate, chat_template, encode_chat
from llama_jax.errors import DataError, InputError, TokenizerError
from llama_jax.tokenizer import Tokenizer

from ..config.data import DataConfig, SourceConfig
from ..config.run import RunConfig
from ..data.conversations import VARIABLES, read_messages, read_variables
from ..data.encode import Encoder
from ..data.lanes import LaneDocumentIterator, Mixture, format_counts
from ..data.lines import list_names
from ..data.order import infinite_order
from ..data.parts import Part, split, validation_config, validation_part
from ..data.records import BadRecord, Records, TooLongRecord, bad_record_error
from ..data.source import RecordSource, open_records

_EXTRA_PATIENCE = 1000  # consecutive unusable records, on top of one epoch, before there are no prompts


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      ids: its tokens, with the header of the assistant's answer if it is a chat.
      prompt: the text, or the messages.
      columns: the record's other fields.
      source, record: where it is, for `PromptData.place`.
    """

    ids: tuple[int, ...]
    prompt: Any
    columns: Mapping[str, Any]
    source: int
    record: int

    def __len__(self) -> int:
        return len(self.ids)


class PromptSource(RecordSource):
    """The prompts of one source, encoded on access."""

    def __init__(self, records: Records, encode: Encoder, template: ChatTemplate | None, longest: int):
        described = template and [template.source, dict(template.tokens)]
        super().__init__(records, "prompt", described)
        self._encode, self._template, self._longest = encode, template, longest

    def prompt(self, record: int, source: int) -> Prompt:
        """Returns one prompt.

        Raises:
          BadRecord: if its record cannot be used, a TooLongRecord if no completion would fit into the row.
        """
        row = self.records.row(record)
        problem: BadRecord | None = None
        try:
            ids, prompt = self._encoded(row)
        except BadRecord as bad:
            problem = bad
        except (InputError, TokenizerError) as error:
            problem = BadRecord("refused prompt", str(error))
        if problem is None and len(ids) > self._longest:
            problem = TooLongRecord(
                "prompt too long",
                f"the prompt has {len(ids)} tokens, and train.seq_len less rl.max_completion_length leaves "
                f"{self._longest}",
            )
        if problem is not None:
            problem.has_location = False
            raise problem
        columns = {name: value for name, value in row.items() if name not in ("prompt", *VARIABLES)}
        return Prompt(tuple(ids), prompt, columns, source, record)

    def _encoded(self, row: Mapping[str, Any]) -> tuple[list[int], Any]:
        prompt = row.get("prompt")
        if prompt is None:
            raise BadRecord("no such field", f"no field 'prompt' (fields: {list_names(row)})")
        if isinstance(prompt, str) and not prompt.lstrip().startswith('[{"'):
            ids = self._encode.ids(prompt, add_bos=None)
            if not ids:
                raise BadRecord("empty prompt", "the prompt is empty")
            return ids, prompt
        messages, variables = read_messages(row, "prompt"), read_variables(row)
        if self._template is None:
            raise DataError(
                "the data has chat messages, and the model has no chat template; set data.template to "
                "llama-2, llama-3, mistral, chatml or a Jinja file"
            )
        return encode_chat(self._encode.tokenizer, self._template, messages, **variables), messages


class Prompts:
    """Random access to some of a source's prompts, or the reason a record is unusable."""

    def __init__(self, source: PromptSource, number: int, index: Sequence[int], config: DataConfig):
        self._source, self._number, self._index, self._config = source, number, index, config

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Prompt | str:
        record = int(self._index[i])
        try:
            return self._source.prompt(record, self._number)
        except BadRecord as bad:
            where = "" if bad.has_location else f"{self._source.records.location(record)}: "
            if isinstance(bad, TooLongRecord):
                if self._config.too_long != "fail":
                    return bad.reason
                raise DataError(
                    f'{where}{bad.message}; shorten it, or raise train.seq_len, or set data.too_long = "drop"'
                ) from None
            if self._config.bad_records == "skip":
                return bad.reason
            raise DataError(bad_record_error(where + bad.message)) from None

    def __repr__(self) -> str:
        return f"Prompts({len(self)})"


class PromptData:
    """A run's prompts.

    Attributes:
      fingerprint: a hash of everything that determines them, but for the seed.
    """

    def __init__(self, run: RunConfig, tokenizer: Tokenizer):
        """Opens, indexes and splits the files.

        Raises:
          DataError: if there are no prompts, or they cannot be read.
        """
        config = run.data
        self._config, self._seed = config, run.train.seed
        encode = Encoder(tokenizer, config.parse_special)
        template = None
        try:
            template = chat_template(tokenizer, config.template or None)
        except TokenizerError:
            if config.template or tokenizer.chat_template is not None:
                raise
        longest = run.train.seq_len - run.rl.max_completion_length

        def open_one(source: SourceConfig) -> Any:
            return PromptSource(open_records(source, rows=True), encode, template, longest)

        self._parts = [split(source, config, open_one(source)) for source in config.sources]
        self._validation = list(self._parts)
        if config.validation_files:
            source = validation_config(config)
            self._validation = [validation_part(source, open_one(source), self._parts)]
        inputs = [encode.fingerprint, longest, config.shuffle, config.source_validation_fraction]
        inputs += [[part.source.fingerprint, float(part.config.weight)] for part in self._parts]
        self.fingerprint = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()
        for number, part in enumerate(self._parts):
            self._check_enough(number, part)

    def is_of(self, fingerprint: str) -> bool:
        """Returns whether a fingerprint is that of these prompts."""
        return fingerprint == self.fingerprint

    def train(self) -> LaneDocumentIterator:
        """Returns an infinite iterator of training prompts, whose state can be saved: `next_item`."""
        orders = [
            infinite_order(
                Prompts(part.source, number, part.train_index, self._config),  # type: ignore[arg-type]
                part.blocks,
                f"{self._seed}/{number}" if self._config.shuffle else None,
            )
            for number, part in enumerate(self._parts)
        ]
        patience = sum(len(part.train_index) for part in self._parts) + _EXTRA_PATIENCE
        return LaneDocumentIterator(
            Mixture(orders, [part.config.weight for part in self._parts], patience), 0, 1
        )

    def validation(self) -> Iterator[Prompt]:
        """Yields the usable validation prompts, in the order of the files."""
        for number, part in enumerate(self._validation):
            index = part.validation_index
            prompts = Prompts(part.source, number, index, self._config)  # type: ignore[arg-type]
            yield from (
                prompt
                for prompt in map(prompts.__getitem__, range(len(index)))
                if not isinstance(prompt, str)
            )

    def place(self, prompt: Prompt, *, validation: bool = False) -> str:
        """Returns file and line of a prompt, for messages."""
        part = (self._validation if validation else self._parts)[prompt.source]
        return part.source.records.location(prompt.record)  # type: ignore[union-attr]

    def describe(self) -> dict[str, Any]:
        """Returns counts of records and bytes, as `Data.describe`."""
        validation = self._validation if self._config.validation_files else []
        parts = [*self._parts, *validation]
        return {
            "documents": sum(len(part.source) for part in parts),
            "validation_documents": sum(len(part.validation_index) for part in parts),
            "bytes": sum(part.source.nbytes for part in parts),
            "notes": [],
        }

    def unigram_loss(self, batches: int | None = None) -> float:
        """NaN: prompts are not predicted."""
        del batches
        return float("nan")

    def _check_enough(self, number: int, part: Part) -> None:
        """Raises DataError if a source has no usable prompt."""
        prompts = Prompts(part.source, number, part.train_index, self._config)  # type: ignore[arg-type]
        skipped: dict[str, int] = {}
        for i in range(len(prompts)):
            item = prompts[i]
            if not isinstance(item, str):
                return
            skipped[item] = skipped.get(item, 0) + 1
        raise DataError(
            f"none of the {len(part.source)} records of {part.config.title!r} is a usable prompt (skipped: "
            f"{format_counts(skipped)}); raise train.seq_len, or correct the data"
        )
