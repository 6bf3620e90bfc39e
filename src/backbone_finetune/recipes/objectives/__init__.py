"""The kinds of targets, with their losses, predictions and metrics."""
