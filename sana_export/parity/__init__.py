"""Does the engine still compute what the PyTorch reference computes?"""
