"""How verify attends to what was selected: by the ops of this package, or by FlashInfer."""
