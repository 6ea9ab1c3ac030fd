"""Ignite handlers: checkpoints, previews, logs, guards."""
