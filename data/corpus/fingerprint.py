"""Fingerprint a corpus: equal for two corpora with the same contents, wherever they are.

The fingerprint depends on the files' contents, never on their dates or folders, so that a copied corpus keeps its
cache. Hashing runs at about 1 GB/s; the size, date and hash of each file are remembered, so that an unchanged file is
hashed only once.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from ..errors import DataError
from ..json_files import fits, read_object, write_json
from .corpus import Corpus

_SETTLED_SECONDS = 2.0  # a file changed less than this ago might change again within the resolution of its date


def corpus_fingerprint(corpus: Corpus, notes: Path | None = None) -> str:
    """Return the fingerprint in hexadecimal. `notes` is the file of remembered hashes; it may be deleted any time."""
    known: dict[str, list] = {}
    if notes is not None and notes.is_file():
        with suppress(DataError, OSError):
            known = {name: note for name, note in read_object(notes).items() if _is_note(note)}
    changed = False
    reading = [corpus.encoding, corpus.text_field, corpus.blank_line, corpus.split]
    parts: list = [[*reading, "verbatim"] if corpus.verbatim else reading]
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
        write_json(notes, known)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _is_note(note: object) -> bool:
    """Tell whether a remembered hash is one: [size, date, SHA-256]."""
    return isinstance(note, list) and len(note) == 3 and fits(note[:2], list[int]) and isinstance(note[2], str)
