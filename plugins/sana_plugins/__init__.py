"""TensorRT plugins of Sana models, build side: kernels compiled ahead of time and packed for a bundle."""
