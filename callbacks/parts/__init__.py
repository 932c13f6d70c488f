"""What callbacks are made of where one file would hold two ideas; no callback itself."""
