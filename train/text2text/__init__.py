"""Text to text: summaries, rewriting, answers; any source and target. Translation's loop, decoding and export."""
