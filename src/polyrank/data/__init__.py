"""Text data: where it comes from, how it is shared out among clients, how it becomes tokens."""
