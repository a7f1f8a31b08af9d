"""What robust mode is worth: a fifth of the clients attack."""
