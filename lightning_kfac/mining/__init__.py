"""Looking through a corpus for windows that a model recites."""
