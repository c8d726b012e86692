"""Compile Sana text-to-image models into engines and prove that they paint the same picture."""

__version__ = "0.1.0"
