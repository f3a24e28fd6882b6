"""Read text from files and folders: documents, sentences, sentence pairs, and the built-in corpora."""
