"""Operators of Sana models: for each one a readable reference and its GPU implementations."""
