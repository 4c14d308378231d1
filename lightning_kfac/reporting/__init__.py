"""Results as tables, figures, TensorBoard and one HTML page."""
