"""The pretraining loop: optimiser groups, schedules, resume, signals."""
