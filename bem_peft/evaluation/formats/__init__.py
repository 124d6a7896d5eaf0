"""Files that hold results: ours, and those of other tools."""
