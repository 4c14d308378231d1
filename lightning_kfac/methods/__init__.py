"""Other ways to suppress recitation, for comparison: one record each (``registry.py``)."""
