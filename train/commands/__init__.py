"""Commands that are no training job: tokenizers, the table of models, parity with the reference implementation."""
