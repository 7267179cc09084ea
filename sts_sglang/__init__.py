"""Draft-guided sparse attention (STS) for SGLang speculative decoding."""

__version__ = "0.1.0"
