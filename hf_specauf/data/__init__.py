"""Text becomes token rows: datasets, chat templates, rows, and answers that the target writes."""
