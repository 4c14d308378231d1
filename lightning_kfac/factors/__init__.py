"""Kronecker factors on disk: folders, eigenbases, moments, other tools' files."""
