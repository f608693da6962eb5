"""What is measured: training, generation, mixing, memory; each group turns options into sections of results."""
