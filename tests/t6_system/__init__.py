"""The whole system: the one-machine stack, its job, its faults, and what it may leave behind."""
