"""Training whole images: module, data, callbacks, metrics and checkpoints."""
