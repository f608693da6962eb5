"""What a run will need, and what should be said about it, before it starts."""
