"""moe: train, study and scale sparse Mixture-of-Experts language models in JAX."""
