"""Texts, memorized sequences and questions: read, tokenized, packed and shared out over ranks."""
