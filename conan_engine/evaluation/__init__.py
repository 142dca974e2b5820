"""Texts to vectors, and what the vectors are worth: tasks, metrics, validation, baselines."""
