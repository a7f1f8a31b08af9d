"""Base models: loading one, and finding its blocks, its adaptable modules and its head."""
