"""Pure functions on tensors: no Lightning, no files, no models."""
