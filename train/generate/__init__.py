"""Text generation: greedy search, beam search, sampling."""
