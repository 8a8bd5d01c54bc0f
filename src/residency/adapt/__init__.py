"""Teach a base model a task (rows + model → model)."""
