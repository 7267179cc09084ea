"""Tools around a server: the demo, what `inspect` shows, a server of one's own, a tiny pair of models."""
