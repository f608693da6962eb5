"""Speed and memory of fedmira against its peers, measured in one run on identical token batches.

Uses the package as its users do; nothing in the package knows about it.
"""
