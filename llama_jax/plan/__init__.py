"""What a program costs on a TPU slice: chips and topologies, compiled programs, arithmetic."""
