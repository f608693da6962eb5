"""The federated algorithms, one a file; `fedmira.federation.registry` lists them by name."""
