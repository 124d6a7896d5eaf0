"""The report of a comparison, and what it is written as."""
