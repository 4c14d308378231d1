"""Several processes: ranks, sharded weights, strategies, a watch over ranks that die."""
