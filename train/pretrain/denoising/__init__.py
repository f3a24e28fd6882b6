"""Objectives of encoder-decoders: restore text from which parts were taken."""
