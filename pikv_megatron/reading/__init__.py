"""Reading: which sealed tokens a decode query attends to, and what it misses."""
