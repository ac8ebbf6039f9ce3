"""Work on what a user hands in that may never end: in a second process, with limits on time and memory."""
