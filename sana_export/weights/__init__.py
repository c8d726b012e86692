"""Checkpoints in: diffusers directories, official `.pth` files, Hugging Face ids and named random models."""
