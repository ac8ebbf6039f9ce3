"""What a command-line program needs: arguments, notes, progress bars, errors as one line."""
