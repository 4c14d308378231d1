"""A run on paper: what a collection takes in memory, time and disk."""
