"""Figures for a person to look at."""
