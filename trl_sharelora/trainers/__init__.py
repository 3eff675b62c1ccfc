"""Subclasses of TRL's trainers, each personalised per user; with `scripts/` the only place that knows trl."""
