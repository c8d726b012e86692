"""Readable PyTorch modules of Sana's components, written for export and speed, equal to diffusers'."""
