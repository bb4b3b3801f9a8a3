"""Other frameworks: index tables as Parquet, scenarios to and from Avalanche, rows as plain PyTorch datasets."""
