"""Personalised adapters as folders that other tools load."""
