"""Files: atomic, checked, locked; the run's folder."""
