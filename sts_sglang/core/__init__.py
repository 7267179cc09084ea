"""A round of draft-guided sparse attention: its state and its steps, without SGLang and without backends."""
