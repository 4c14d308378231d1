"""What a GPU does: correctness first, then rates, memory, linear algebra, and what a whole run will take."""
