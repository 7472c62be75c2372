"""The finished dataset: JSONL, Parquet, and its card."""
