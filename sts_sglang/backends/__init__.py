"""Attention backends: the target's (sparse verify), the draft's (capture), the torch reference."""
