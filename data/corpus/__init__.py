"""Text from files and folders: documents, sentences, parallel lines, and the corpora that come along."""
