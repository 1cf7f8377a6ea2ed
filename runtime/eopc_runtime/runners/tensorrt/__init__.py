"""The TensorRT runner: engines of a bundle on an NVIDIA GPU, with caches that stay in its memory."""
