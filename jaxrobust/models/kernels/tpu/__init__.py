"""Kernels for TPUs in Pallas, each with the plain formula's name; they also run interpreted."""
