"""Procedural pictures with captions that are true by construction, and an evaluator that reads pictures back.

What `sana-nano` is trained on and judged by. Nothing is imported here: the captions need no torch, and only the
evaluator needs scikit-image.
"""
