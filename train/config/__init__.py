"""A run's configuration: one frozen, validated dataclass for each section of its TOML file, and the reader.

`run.py` combines the sections in `RunConfig`; `read.py` makes one from a TOML file and command-line flags.
"""
