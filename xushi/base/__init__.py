"""Errors, strict configs, atomic files, seeds, facts about the machine, a run's tracking store."""
