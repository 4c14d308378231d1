"""Attacks: does what an edit suppressed come back? One module an attack, behind one interface."""
