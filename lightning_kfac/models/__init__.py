"""Models: loading and saving, tracked layers, what is probed of them, tokens that they read."""
