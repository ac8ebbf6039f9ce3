"""Training data: files to packed batches, in an order that is a function of (seed, step) alone.

    data = open_data(config, tokenizer, seq_len=1024, batch_size=64, seed=0)
    batches = data.train()
    batch = next(batches)        # tokens, segment_ids, positions: int32 [rows of this process, seq_len]
                                 # and, of finetuning's objectives, mask: int32, value: f32
    saved = batches.state()      # of the batches handed out, for the checkpoint

files.py finds files; lines.py and tables.py read their records; source.py makes documents of token ids of
them; lanes.py orders and packs those; batches.py makes batches ahead of the step. For finetuning, forms.py
reads records into examples, examples.py encodes them, packing.py makes rows of whole ones, and show.py
prints them. opening.py, parts.py and dataset.py put it all together.
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
