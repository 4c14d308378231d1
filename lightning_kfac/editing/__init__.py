"""The parts of an edit: what to do, one layer's mathematics, what was done, and how it travels."""
