"""The collection as a Lightning callback: batches to the engine, factors to the run's folder, resume."""
