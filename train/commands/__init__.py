"""Commands other than training jobs: tokenizers, the list of models, parity with the reference implementation."""
