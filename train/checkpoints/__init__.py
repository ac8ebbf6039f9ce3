"""Saving and restoring runs: Orbax behind one class, every file sealed by a checksum."""
