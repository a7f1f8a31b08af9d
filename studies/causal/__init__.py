"""Instruction tuning of a small language model, federated against central."""
