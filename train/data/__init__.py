"""Training data: files to packed batches, in an order that is a function of (seed, step) alone.

    data = open_data(config, tokenizer, seq_len=1024, batch_size=64, seed=0)
    batches = data.train()
    batch = next(batches)        # tokens, segment_ids, positions: int32 [rows of this process, seq_len]
                                 # and, for finetuning, mask: int32, value: f32
    state = batches.state()      # position in the data after the batches returned so far, for the checkpoint

files.py finds files; lines.py and tables.py read their records; source.py encodes them as documents of token
ids; lanes.py orders and packs documents; batches.py prefetches batches. For finetuning, formats.py reads
records into examples, examples.py encodes them, packing.py packs whole examples into rows, and show.py prints
them. opening.py, parts.py and dataset.py combine all of this.
"""

from ..config.data import DataConfig, SourceConfig
from ..config.objective import Objective
from .batches import Batches
from .dataset import Data
from .opening import open_data, train_texts
from .show import show_batch

__all__ = [
    "Batches",
    "Data",
    "DataConfig",
    "Objective",
    "SourceConfig",
    "open_data",
    "show_batch",
    "train_texts",
]
