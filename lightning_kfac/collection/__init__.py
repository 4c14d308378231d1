"""Collecting curvature: capture, sums, engine, memory plan, with or without a Trainer."""
