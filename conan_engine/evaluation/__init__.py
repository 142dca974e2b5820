"""Texts to vectors, and how good the vectors are: tasks, metrics, validation, baselines."""
