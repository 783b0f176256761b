"""The text layer: token ids, incremental decoding, chat templates, stop strings."""
