"""The report of the cost model, and its tables and figures."""
