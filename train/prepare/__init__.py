"""Prepared data: a run's text as shards of token ids, tokenized, without duplicates, globally shuffled.

    llama-jax data prepare CONFIG OUT
    steps.prepare(config.data, tokenizer, Path("OUT"), seed=config.train.seed)

It goes in three steps (steps.py), each made of pieces that are independent of each other, deterministic, and
renamed to their final names when complete: repeating one changes nothing, and a killed command goes on.

1. chunks.py tokenizes ranges of records, job.py says which;
2. duplicates.py finds the documents whose ids occur before;
3. shards.py writes the documents in the order of the first epoch.

command.py is the command. local.py runs the steps on the cores of this machine, pipeline.py on Apache Beam;
the folders are equal to the byte. manifest.py ends one with its manifest, which `train.data.prepared` reads.
"""
