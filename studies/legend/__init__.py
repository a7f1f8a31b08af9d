"""LEGEND and its baselines on a simulated fleet."""
