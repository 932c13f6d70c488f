"""Smol Lightning: the Smol Training Playbook, runnable."""
