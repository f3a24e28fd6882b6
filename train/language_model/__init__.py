"""Use of language models: generate text, measure perplexity, do tasks by prompts."""
