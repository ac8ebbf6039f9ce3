"""Mutation testing: one-line faults in every room, and the tests that catch them."""
