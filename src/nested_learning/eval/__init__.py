"""Evaluation: tasks the field recognises, scored on a checkpoint, with intervals and a log of samples."""
