"""Everything that happens before training or evaluation starts."""
