"""Numbers and state to disk and back: run directories, checkpoints, and stopping on a signal."""
