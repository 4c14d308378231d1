"""The text and sequences of the embedded demo."""
