"""FedARA against its baselines."""
