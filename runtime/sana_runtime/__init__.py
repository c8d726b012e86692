"""The torch-free runtime for Sana bundles: `Pipeline.load(bundle).generate(prompt)`."""

__version__ = "0.1.0"
