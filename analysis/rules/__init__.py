"""What one operation costs: one rule per operation, and per activation store."""
