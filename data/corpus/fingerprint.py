"""What a corpus is, in one short string: equal for two that read the same, wherever they lie.

The string is made of the files' contents, never of their dates or folders, so that a copied corpus keeps its cache.
Hashing runs at about 1 GB/s; a note of each file's size, date and hash spares an unchanged file the second hashing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from .corpus import Corpus

_SETTLED_SECONDS = 2.0  # a file changed less than this ago might change again within the resolution of its date


def corpus_fingerprint(corpus: Corpus, notes: Path | None = None) -> str:
    """Hexadecimal. `notes` is the file that remembers hashes between runs; it may be deleted at any time."""
    known: dict[str, list] = {}
    if notes is not None and notes.is_file():
        try:
            known = json.loads(notes.read_text(encoding="utf-8"))
        except ValueError:
            known = {}
    changed = False
    parts: list = [[corpus.encoding, corpus.text_field, corpus.blank_line, corpus.split]]
    for source in corpus.sources:
        parts.append([source.name, source.format])
        for name, file in source.files:
            status = file.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            note = known.get(str(file.resolve()))
            if note is None or note[:2] != stamp:
                with file.open("rb") as opened:
                    note = [*stamp, hashlib.file_digest(opened, "sha256").hexdigest()]
                if time.time() - status.st_mtime > _SETTLED_SECONDS:
                    known[str(file.resolve())] = note
                    changed = True
            parts.append([name, note[0], note[2]])
    if notes is not None and changed:
        notes.parent.mkdir(parents=True, exist_ok=True)
        temporary = notes.with_name(f".{notes.name}.{os.getpid()}")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(notes)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
