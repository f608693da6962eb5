"""The contestants: each trains the round of a task from the same start.

Each is as good as its users would have it: one model in memory, no work between rounds that its users could leave out.
"""
