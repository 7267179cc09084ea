"""Attention backends: what SGLang calls in every layer. They decide nothing."""
