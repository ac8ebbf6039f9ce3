"""A run's settings: one frozen, checked dataclass for each section of its TOML file, and the reader."""
