"""Conditional anomaly detection with conditional variational autoencoders."""
