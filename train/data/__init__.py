"""Training data: files to packed batches, in an order that is a function of (seed, step) alone.

    data = open_data(config, tokenizer, seq_len=1024, batch_size=64, seed=0)
    batches = data.train()
    batch = next(batches)        # tokens, segment_ids, positions: int32 [rows of this process, seq_len]
    saved = batches.state()      # of the batches handed out, for the checkpoint

files.py finds files; lines.py and tables.py read their records; source.py makes documents of token ids of
them; lanes.py orders and packs those; batches.py makes batches ahead of the step.
"""

from train.data.batches import Batches
from train.data.config import DataConfig, SourceConfig
from train.data.dataset import Data, open_data, train_texts

__all__ = ["Batches", "Data", "DataConfig", "SourceConfig", "open_data", "train_texts"]
