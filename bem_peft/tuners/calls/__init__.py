"""What a call of the model carries to its adapters."""
