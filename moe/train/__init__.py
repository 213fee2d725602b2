"""From a loss to a finished run: state, step, loop, checkpoints, metrics and progress."""
