"""The encoder-decoders, one file a family."""
