"""Training data: files to packed batches, in an order that is a function of (seed, step) alone.

    data = open_data(config, tokenizer, seq_len=1024, batch_size=64, seed=0)
    batches = data.train()
    batch = next(batches)        # tokens, segment_ids, positions: int32 [rows of this process, seq_len]
                                 # and, for finetuning, mask: int32, value: f32
    state = batches.state()      # position in the data after the batches returned so far, for the checkpoint

files.py finds files, folders.py those of Hugging Face datasets; compression.py and cache.py decompress them;
lines.py reads text and JSON through an index, which indexing.py and stored_index.py find and index_making.py
makes (pieces.py scans, index_parts.py and index.py store); tables.py and arrow.py read tables,
concatenated.py several formats; source.py encodes records as documents of token ids; prepared.py and
layout.py read those encoded ahead of time. splitting.py splits them, order.py shuffles, lanes.py packs, and
batches.py prefetches batches; validation.py keeps those of the validation set, which sharing.py divides among
processes.
For finetuning, formats.py and conversations.py read records into examples, sides.py and examples.py encode
them, mismatched.py adds what KTO compares them with, packing.py packs whole examples into rows, and show.py
prints them. control_tokens.py counts what texts spell like control tokens. opening.py, parts.py and
dataset.py combine all of this.
"""

from ..config.data import DataConfig, SourceConfig
from ..config.objective import Objective
from .batches import Batches
from .dataset import Data
from .opening import open_data, train_texts
from .sharing import Peers
from .show import show_batch

__all__ = [
    "Batches",
    "Data",
    "DataConfig",
    "Objective",
    "Peers",
    "SourceConfig",
    "open_data",
    "show_batch",
    "train_texts",
]
