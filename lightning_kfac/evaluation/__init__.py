"""Measuring a model: recitation, losses, rankings, and one evaluation of them all."""
