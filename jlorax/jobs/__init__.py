"""Trainings beside a server: the data that was sent for them, and the jobs that use it."""
