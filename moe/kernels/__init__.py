"""Kernels: the few operations whose speed decides the speed of a step, each with a slow oracle in its tests."""
