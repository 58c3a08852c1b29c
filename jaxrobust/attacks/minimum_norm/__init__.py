"""Attacks that look for the nearest adversarial example instead of staying in a ball: DDN, FMN."""
