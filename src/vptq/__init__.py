"""Vector post-training quantization of language models."""
