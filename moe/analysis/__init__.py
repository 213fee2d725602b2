"""What a run has learned: compression baselines, specialisation of experts, plots and the report."""
